"""What was made, put on a Hugging Face hub: a folder's files, or one file, in a model repository.

upload(Path("chat"), "user/chat")      https://huggingface.co/user/chat/tree/main/
"""

from pathlib import Path

from huggingface_hub import HfApi


def upload(path: Path, name: str, private: bool = False) -> str:
    """The address. The repository is made where it is not there. Raises ValueError where the hub refuses."""
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if path.is_dir():
            return str(api.upload_folder(repo_id=name, folder_path=path, commit_message="Upload model"))
        return str(api.upload_file(repo_id=name, path_or_fileobj=path, path_in_repo=path.name))
    except Exception as error:  # of the hub, of HTTP, of the disk
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--push_to_hub {name}: {reason}; log in with `hf auth login`, or set HF_TOKEN") from None
