"""Fetch data files of others, whole or not at all: their names, sizes and licences, then the files, checked.

    python scripts/download_data.py                                          what is known, with sizes and licences
    python scripts/download_data.py --name minimind                          into dataset/, 3.2 GB, from Hugging Face
    python scripts/download_data.py --name minimind --source modelscope
    python scripts/download_data.py --repo roneneldan/TinyStories --file TinyStories-valid.txt --into data

    dataset/dpo.jsonl: 53.7MB, size and hash are the hub's

A file grows as NAME.HASH.part and gets its name once size and hash are those that the hub lists. The same command goes
on where it was stopped; what is there already is checked and left alone. Nothing is fetched that the disk has no room
for. A token in HF_TOKEN and another hub in HF_ENDPOINT or MODELSCOPE_ENDPOINT are used.
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from tqdm import tqdm

MINIMIND = {"huggingface": "jingyaogong/minimind_dataset", "modelscope": "gongjy/minimind_dataset"}
LICENCE = "Apache-2.0, CC-BY-NC-2.0"  # its page names both, and not which file has which
AFTER_SFT = {
    "dpo.jsonl": ("dpo", "54 MB"),
    "rlaif.jsonl": ("grpo", "24 MB"),
    "agent_rl.jsonl": ("grpo with --tools", "86 MB"),
    "agent_rl_math.jsonl": ("grpo with --tools", "18 MB"),
}
MINI = {"pretrain_t2t_mini.jsonl": ("pretrain", "1.2 GB"), "sft_t2t_mini.jsonl": ("full_sft", "1.7 GB")}
FULL = {"pretrain_t2t.jsonl": ("pretrain", "10 GB"), "sft_t2t.jsonl": ("full_sft", "14 GB")}
KNOWN = {"minimind": MINI | AFTER_SFT, "minimind_full": FULL | AFTER_SFT}  # file -> stage, about how large
PAGE = 200  # files of a listing at a time, of ModelScope
amount = partial(tqdm.format_sizeof, suffix="B")  # 1241043656 -> "1.24GB"


class Remote(NamedTuple):
    """A file as a hub lists it."""

    path: str
    size: int  # bytes
    digest: str  # hexadecimal: SHA-256, or of a small file on Hugging Face git's SHA-1; "" where there is none
    url: str


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr for what is wrong, 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    if arguments.name is None and arguments.repo is None:
        print(known())
        return 0
    import httpx

    try:
        fetch_all(arguments)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError, httpx.HTTPError) as error:  # a hub's errors have several lines
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--name", choices=tuple(KNOWN), help="a known set")
    what.add_argument("--repo", metavar="OWNER/NAME", help="any other data set of the hub")
    parser.add_argument("--file", nargs="+", metavar="FILE", help="of these alone; by default all of --name's")
    parser.add_argument("--source", choices=tuple(MINIMIND), default="huggingface", help="the hub [huggingface]")
    parser.add_argument("--revision", help="branch or commit; by default the newest")
    parser.add_argument("--into", type=Path, default=Path("dataset"), metavar="FOLDER", help="[dataset]")
    arguments = parser.parse_args(argv)
    if arguments.repo and not arguments.file:
        parser.error("--repo needs --file: the names of the files to fetch")
    return arguments


def known() -> str:
    where = " or ".join(f"{repo} (--source {source})" for source, repo in MINIMIND.items())
    lines = [f"From {where}; licences: {LICENCE}"]
    for name, files in KNOWN.items():
        lines.append(f"\n--name {name}")
        lines += [f"  {file:24} {size:>7}  {stage}" for file, (stage, size) in files.items()]
    return "\n".join(lines)


def fetch_all(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a file that the hub does not list or that came other than listed, and for too full a disk;
    OSError and httpx.HTTPError for a hub that cannot be reached."""
    repo = arguments.repo or MINIMIND[arguments.source]
    listed = {"huggingface": huggingface, "modelscope": modelscope}[arguments.source](repo, arguments.revision)
    wanted = arguments.file or list(KNOWN[arguments.name])
    there = {file.path: file for file in listed}
    if missing := [path for path in wanted if path not in there]:
        raise ValueError(f"{repo} has no {', '.join(missing)}; it has {', '.join(there) or 'nothing'}")
    files = [there[path] for path in wanted]
    total, licence = amount(sum(file.size for file in files)), "on its page" if arguments.repo else LICENCE
    print(f"{repo} ({arguments.source}): {len(files)} files, {total}; licence: {licence}")
    check_room(files, arguments.into)
    for file in files:
        fetch(file, arguments.into, arguments.source)
        checked = "size and hash are the hub's" if file.digest else "its size is the hub's, which lists no hash"
        print(f"{arguments.into / file.path}: {amount(file.size)}, {checked}", flush=True)


# What a hub has ------------------------------------------------------------------------------------------------------


def huggingface(repo: str, revision: str | None) -> list[Remote]:
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(repo, repo_type="dataset", revision=revision, recursive=True)
    files = [each for each in tree if isinstance(each, RepoFile)]
    url = partial(hf_hub_url, repo, repo_type="dataset", revision=revision)
    return [Remote(f.path, f.size, f.lfs.sha256 if f.lfs else f.blob_id, url(f.path)) for f in files]


def modelscope(repo: str, revision: str | None) -> list[Remote]:
    """By the two routes that its own library asks."""
    from huggingface_hub.utils import get_session

    base = f"{os.environ.get('MODELSCOPE_ENDPOINT', 'https://modelscope.cn')}/api/v1/datasets/{repo}/repo"
    at = {"Revision": revision or "master"}
    found: list[dict[str, Any]] = []
    while len(found) % PAGE == 0:
        page = at | {"Recursive": "True", "PageNumber": str(len(found) // PAGE + 1), "PageSize": str(PAGE)}
        answer = get_session().get(f"{base}/tree", params=page, timeout=30)
        answer.raise_for_status()
        if not (data := answer.json().get("Data")):  # of a name that it does not know, for one
            raise ValueError(f"{base}: found {answer.text[:200]}, expected the files of a data set")
        if not data["Files"]:
            break
        found += data["Files"]
    files = [each for each in found if each["Type"] != "tree"]
    urls = [f"{base}?{urlencode(at | {'FilePath': each['Path']})}" for each in files]
    return [Remote(f["Path"], f["Size"], f.get("Sha256") or "", url) for f, url in zip(files, urls, strict=True)]


# Onto this disk ------------------------------------------------------------------------------------------------------


def part_of(file: Remote, folder: Path) -> Path:
    """A file that changed on the hub meanwhile is begun anew."""
    return folder / f"{file.path}.{file.digest[:8]}.part"


def check_room(files: Sequence[Remote], folder: Path) -> None:
    """Raises ValueError where what is still to come is more than the disk has free."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {part_of(file, folder): file.size for file in files if not (folder / file.path).exists()}
    left = sum(size - (part.stat().st_size if part.is_file() else 0) for part, size in parts.items())
    free = shutil.disk_usage(folder).free
    if left > free:
        raise ValueError(
            f"{folder}: {amount(left)} to fetch, {amount(free)} free on its disk; make room, or give another --into or "
            "fewer files with --file"
        )


def fetch(file: Remote, folder: Path, source: str) -> None:
    """Raises ValueError where what is there, or what came, is not what the hub lists."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    path, part = folder / file.path, part_of(file, folder)
    if path.exists():
        if not is_whole(file, path):
            raise ValueError(f"{path} is there, and is not what the hub has; move it away, or give another --into")
        return
    part.parent.mkdir(parents=True, exist_ok=True)
    headers = {"Accept-Encoding": "identity"} | (build_hf_headers() if source == "huggingface" else {})
    with part.open("ab") as output:  # of hf_hub_download a new process begins at 0; this goes on
        http_get(
            file.url, output, resume_size=output.tell(), headers=headers, expected_size=file.size,
            displayed_filename=file.path,
        )  # fmt: skip
    if not is_whole(file, part):
        part.unlink()
        raise ValueError(f"{path}: what came has another hash than the hub lists, and is thrown away; try again")
    part.replace(path)


def is_whole(file: Remote, path: Path) -> bool:
    """Whether size and hash are those listed."""
    digest = hashlib.sha1(b"blob %d\0" % file.size) if len(file.digest) == 40 else hashlib.sha256()
    with path.open("rb") as read:
        while block := read.read(2**20):
            digest.update(block)
    return path.stat().st_size == file.size and file.digest in ("", digest.hexdigest())


if __name__ == "__main__":
    sys.exit(main())
