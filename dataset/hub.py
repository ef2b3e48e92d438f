"""hf:// names in, paths on this disk out: models and data files of a Hugging Face hub, downloaded once and kept.

    local_path("hf://Qwen/Qwen3-0.6B")                          ~/.cache/huggingface/hub/.../snapshots/<commit>
    local_path("hf://user/model@v1.0")                          of a branch, a tag or a commit
    local_path("hf://datasets/user/texts/data/part1.jsonl")     .../snapshots/<commit>/data/part1.jsonl
    local_path("out/pretrain_512")                              the same again

Where the hub is (HF_ENDPOINT), who asks (HF_TOKEN) and where files are kept (HF_HOME) is read by huggingface_hub.
"""

SCHEME = "hf://"
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]  # no pickles: they can run code


def local_path(name: str) -> str:
    """Raises ValueError for a name that is not of these forms, or that cannot be had."""
    if not name.startswith(SCHEME):
        return name
    parts = name.removeprefix(SCHEME).split("/")
    data = parts[0] == "datasets"
    repository, _, revision = "/".join(parts[data : data + 2]).partition("@")
    file = "/".join(parts[data + 2 :])
    if repository.count("/") != 1 or bool(file) != data:
        raise ValueError(f"{name}: expected hf://USER/MODEL, or hf://datasets/USER/NAME/FILE (NAME@REVISION)")
    from huggingface_hub import hf_hub_download, snapshot_download  # seconds to import; most runs need none

    try:
        if data:
            return hf_hub_download(repository, file, repo_type="dataset", revision=revision or None)
        return snapshot_download(repository, revision=revision or None, allow_patterns=MODEL_FILES)
    except Exception as error:  # of the hub, of HTTP, of the disk: each library under it has its own
        raise ValueError(f"{name} cannot be had: {' '.join(str(error).split())[:300]}") from None
