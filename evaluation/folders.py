"""Options that name several folders, A,B,C: what is refused, and the names of their results."""

import itertools
from pathlib import Path


def split_folders(value: str) -> list[str]:
    return value.split(",") if value else []


def same_folder(first: str, second: str) -> bool:
    return _resolved(first) == _resolved(second)


def folder_rules(option: str, value: str, remedy: str) -> list[tuple[bool, str]]:
    """Rules of `cli.refuse`: each folder exists, and none is given twice.

    Args:
        remedy: what to give instead of a folder that does not exist.
    """
    folders = split_folders(value)
    paths = [_resolved(folder) for folder in folders]
    repeated = {
        folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1
    }
    return [
        *(
            (
                not folder or not Path(folder).is_dir(),
                f"{option} {folder or value}: no such folder: {remedy}, or several as A,B,C",
            )
            for folder in dict.fromkeys(folders)
        ),
        (
            bool(repeated),
            f"{option} {value}: {', '.join(sorted(repeated))} is given twice: keep one",
        ),
    ]


def name_folders(value: str) -> dict[str, str]:
    """Folders by their own names, with a number where an earlier folder has the name.

    >>> name_folders("mr/prepared,news,hi/prepared/")
    {'prepared': 'mr/prepared', 'news': 'news', 'prepared_2': 'hi/prepared/'}
    """
    names: dict[str, str] = {}
    for folder in split_folders(value):
        own = Path(folder).expanduser().absolute().name
        numbered = (f"{own}_{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([own], numbered) if name not in names)
        names[name] = folder
    return names


def name_adapters(adapter: str) -> dict[str, str]:
    """The folders of --adapter by the names of their systems.

    >>> name_adapters("run/adapter"), name_adapters("a,b"), name_adapters("")
    ({'adapter': 'run/adapter'}, {'adapter_1': 'a', 'adapter_2': 'b'}, {})
    """
    if "," not in adapter:
        return {"adapter": adapter} if adapter else {}
    return {f"adapter_{index}": folder for index, folder in enumerate(split_folders(adapter), 1)}


def _resolved(folder: str) -> Path:
    return Path(folder).expanduser().resolve()
