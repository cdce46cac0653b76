"""What a folder of images holds, before any is decoded: classes, parts and domains, by the names below the root.

Four layouts:

- root/<class>/*: no parts and no domains, images at the first level below the root. Every class is cut 70 : 10 : 20
  into train, val and test, so it needs 3 images at least.
- root/<split>/<class>/*: splits are train (or training), test (or testing) and optionally val (or valid, validation).
  Without val, a tenth of every training class becomes val. With train and val only, val is the test part: ImageNet's
  convention. If no class is in two splits the set is a few-shot one (mini-ImageNet, CUB) and needs all three splits.
- root/<domain>/<class>/*: any other names, images at the second level, two domains at least (Office-31, Office-Home,
  PACS), the same classes in each. Every class of every domain is cut 70 : 10 : 20 into train, val and test.
- root/<domain>/<split>/<class>/*: domains that come with splits (VLCS, DomainNet), the same splits in each, used as in
  the first layout.

A cut draws from no run's seed: it is fixed by a salt, and the manifest records both (see images.stratified).

Hidden names are passed over at every level below the root: those that begin with a dot, and LITTER. Links to folders
and files are followed; one to nothing is refused. An image deeper than its class folder is refused, also where every
class has its images in one more folder (tiny-ImageNet's train/<class>/images): no rule tells such a folder from a class
of classes. A name of splits where a class is expected is refused, and so are domains or classes that all look like
splits of other names (train2017, test_set, dev); only "train", the vehicle, is a class where it
holds images and stands beside two others at least (VisDA, DomainNet, CIFAR-100), and a note says so.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from norms.values import nearest
from tasks.data.decoding import SUFFIXES
from tasks.data.images import stratified
from tasks.data.prepared import PARTS

SPLITS = dict.fromkeys(("train", "training"), "train")
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")
SPLITS |= dict.fromkeys(("test", "testing"), "test")
LIKE_SPLITS = re.compile(
    rf"({'|'.join(SPLITS)}|dev|eval|evaluation|holdout)[ _-]?(set|data|images|split|part)?[ _-]?\d*"
)
LITTER = {"__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found"}
SPLIT_NAMES = ", ".join(SPLITS)
OF_CLASSES, OF_SPLITS, OF_DOMAINS = "root/class/*", "root/split/class/*", "root/domain/class/*"
OF_DOMAINS_OF_SPLITS = "root/domain/split/class/*"
LAYOUTS = f"{OF_SPLITS}, {OF_DOMAINS}, {OF_DOMAINS_OF_SPLITS} or {OF_CLASSES}"
VALIDATION_FRACTION = 0.1
WHOLE_FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}
TRAIN_FRACTIONS = {"train": 1 - VALIDATION_FRACTION, "val": VALIDATION_FRACTION}

Listing = dict[str, list[tuple[str, int]]]
"""part -> (path below the root, label) of every image, sorted by path"""
_Classes = dict[str, list[str]]
"""class -> paths below the root of its images, sorted"""


@dataclass(frozen=True)
class FolderListing:
    """What a folder holds: domain -> part -> images. No domains: the one domain "".

    Args:
        class_names: one per label.
        domains: in the order of their names.
        disjoint_classes: the parts share no class.
        sizes: path below the root -> bytes, of every image.
        notes: what was understood but may not have been meant, each one line.
        layout: which of the layouts above.
        cut: how images of one folder were dealt out to parts: the rule, the fractions and the salt; None where the
            folders say it.
    """

    class_names: list[str]
    domains: dict[str, Listing]
    disjoint_classes: bool
    sizes: dict[str, int]
    notes: list[str]
    layout: str
    cut: dict[str, Any] | None = None


@dataclass
class _Tree:
    """A folder as it is walked: what was seen of it so far. Every refusal names the root and the path below it."""

    root: Path
    sizes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def refusal(self, reason: str) -> ValueError:
        return ValueError(f'folder "{self.root}": {reason}')

    def entries(self, below: str) -> tuple[list[str], dict[str, int]]:
        """(names of folders, image name -> bytes) of one folder, sorted, without hidden names."""
        folders, images = [], {}
        path = below
        try:
            for name in sorted(os.listdir(self.root / below)):
                if name.startswith(".") or name.lower() in LITTER:
                    continue
                path = f"{below}/{name}" if below else name
                image = Path(name).suffix.lower() in SUFFIXES
                found = (self.root / path).stat()
                if stat.S_ISDIR(found.st_mode):
                    folders.append(name)
                elif image and stat.S_ISREG(found.st_mode):
                    images[name] = found.st_size
                elif image:
                    raise self.refusal(f'"{path}" is no regular file')
        except OSError as error:
            if (self.root / path).is_symlink():
                raise self.refusal(f'"{path}" is a link that leads nowhere ({error.strerror})') from error
            raise self.refusal(f'"{path or "."}" can not be read: {error.strerror}') from error
        return folders, images

    def note_stray(self, below: str, images: dict[str, int]) -> None:
        if images:
            first = f"{below}/{next(iter(images))}".lstrip("/")
            self.notes.append(f'{len(images)} images above the class folders are left out, such as "{first}"')

    def classes(self, top: str, kind: str) -> _Classes:
        """The classes of one split or domain, `top`; refuses where there are none, or one has no image of its own."""
        names, stray = self.entries(top)
        if not names:
            raise self.refusal(f'{kind} "{top}" has no class folders; expected {LAYOUTS}')
        self.note_stray(top, stray)
        if kind == "domain":  # below a split they are classes, whatever their names
            self.check_like_splits(names, f"{top}/")
        found = {name: self.images(f"{top}/{name}") for name in names}
        self.check_names(top, found)
        empty = [name for name, images in found.items() if not images]
        allowed = f"allowed: {', '.join(sorted(SUFFIXES))}"
        if len(empty) == len(names) > 1:
            raise self.refusal(f'{kind} "{top}" has {len(names)} class folders and no image in any of them ({allowed})')
        if empty:
            raise self.refusal(f'no image in "{top}/{empty[0]}" ({kind} "{top}", class "{empty[0]}"; {allowed})')
        return found

    def images(self, folder: str) -> list[str]:
        """The images of a class folder; refuses those that lie deeper, and folders with an image's name."""
        folders, images = self.entries(folder)
        for name in folders:
            if Path(name).suffix.lower() in SUFFIXES:
                raise self.refusal(f'"{folder}/{name}" is a folder with an image\'s name')
            deep = next(self.below(f"{folder}/{name}"), None)
            if deep is not None:
                raise self.refusal(f'"{deep}" lies deeper than a class folder\'s images; expected {LAYOUTS}')
        paths = {f"{folder}/{name}": size for name, size in images.items()}
        self.sizes |= paths
        return list(paths)

    def below(self, folder: str) -> Iterator[str]:
        """Images at any depth below a folder, each real folder once, however many links lead to it."""
        seen, left = set(), [folder]
        while left:
            folder = left.pop()
            here = (self.root / folder).stat()
            if (here.st_dev, here.st_ino) in seen:
                continue
            seen.add((here.st_dev, here.st_ino))
            folders, images = self.entries(folder)
            yield from (f"{folder}/{name}" for name in images)
            left += [f"{folder}/{name}" for name in reversed(folders)]

    def check_like_splits(self, names: list[str], above: str) -> None:
        """Refuses several folders that all look like splits, and are not all called so."""
        if len(names) > 1 and _splits(names) != names and all(LIKE_SPLITS.fullmatch(name.lower()) for name in names):
            raise self.refusal(
                f'"{above}{names[0]}" and the folders beside it look like splits; call those {SPLIT_NAMES}'
            )

    def check_names(self, top: str, classes: _Classes) -> None:
        splits, above = _splits(list(classes)), f"{top}/" if top else ""
        if not splits:
            return
        if len(classes) < 3 or [name.lower() for name in splits] != ["train"] or not classes[splits[0]]:
            others = (
                f" beside {_several([n for n in classes if n not in splits])}" if len(splits) < len(classes) else ""
            )
            raise self.refusal(
                f'"{above}{splits[0]}" has a split\'s name where a class stands{others}; expected {LAYOUTS}'
            )
        self.notes.append(f'"{above}{splits[0]}" is taken for a class, not for a split')


def list_folder(root: Path) -> FolderListing:
    """Look at a folder's layout.

    Raises:
        ValueError: no such folder, or a layout that is not one of those above; says what was found and expected.
    """
    tree = _Tree(root)
    if not os.path.isdir(root):
        raise tree.refusal("no such folder")
    tops, stray = tree.entries("")
    tree.note_stray("", stray)
    if not tops:
        raise tree.refusal(f"no subfolders; expected {LAYOUTS}")
    tree.check_like_splits(tops, "")
    splits = _splits(tops)
    if [name.lower() for name in splits] == ["train"] and len(tops) > 2 and _are_classes(tree, tops):
        return _as_classes(tree, {top: tree.images(top) for top in tops})
    if splits and len(splits) < len(tops):
        raise tree.refusal(
            f"{_several(tops)} mixes splits ({SPLIT_NAMES}) with other names; expected splits only, or domains only"
        )
    if splits:
        return _as_splits(tree, {top: tree.classes(top, "split") for top in tops})
    if _are_classes(tree, tops):
        return _as_classes(tree, {top: tree.images(top) for top in tops})
    if len(tops) < 2:
        raise tree.refusal(f'one subfolder, "{tops[0]}"; expected splits ({SPLIT_NAMES}) or at least two domains')
    inner = {top: tree.entries(top)[0] for top in tops}
    with_splits = [top for top in tops if inner[top] and _splits(inner[top]) == inner[top]]
    if not with_splits:
        return _as_domains(tree, {top: tree.classes(top, "domain") for top in tops})
    if len(with_splits) < len(tops):
        other = next(top for top in tops if top not in with_splits)
        raise tree.refusal(
            f'domain "{with_splits[0]}" has splits ({_several(inner[with_splits[0]])}), domain "{other}" has '
            f"{_several(inner[other]) or 'no folders'}; expected splits in all domains or in none"
        )
    for top in tops:
        tree.note_stray(top, tree.entries(top)[1])
    found = {d: {s: tree.classes(f"{d}/{s}", "split") for s in inner[d]} for d in tops}
    return _as_domains_of_splits(tree, found)


def _are_classes(tree: _Tree, tops: list[str]) -> bool:
    """Whether the folders below the root are classes: some hold images, and no image lies deeper."""
    found = {top: tree.entries(top) for top in tops}
    if not any(images for _, images in found.values()):
        return False
    return not any(any(tree.below(f"{top}/{name}")) for top, (inner, _) in found.items() for name in inner)


def _as_classes(tree: _Tree, classes: _Classes) -> FolderListing:
    if len(classes) < 2:
        raise tree.refusal(f'one class, "{next(iter(classes))}"; expected two or more')
    tree.check_names("", classes)
    for name, images in classes.items():
        if len(images) < len(PARTS):
            found = f"has {len(images)} images" if images else "has no image"
            raise tree.refusal(f'class "{name}" {found}; a cut into {", ".join(PARTS)} needs {len(PARTS)} or more')
    names = sorted(classes)
    parts = _cut(_labelled(classes, names), WHOLE_FRACTIONS, "folder")
    return _checked(tree, names, {"": parts}, OF_CLASSES, _rule(WHOLE_FRACTIONS, "folder"))


def _as_splits(tree: _Tree, found: dict[str, _Classes]) -> FolderListing:
    splits = _by_part(tree, found)
    names = sorted({c for classes in splits.values() for c in classes})
    if sum(len(classes) for classes in splits.values()) == len(names):
        if "val" not in splits:
            raise tree.refusal("train and test share no class (few-shot), so a val folder is needed")
        parts = {part: _labelled(classes, names) for part, classes in splits.items()}
        return FolderListing(names, {"": parts}, True, tree.sizes, tree.notes, OF_SPLITS)
    cut = None if "val" in splits else _rule(TRAIN_FRACTIONS, "folder")
    return _checked(tree, names, {"": _parts(tree, splits, names, "folder")}, OF_SPLITS, cut)


def _as_domains_of_splits(tree: _Tree, found: dict[str, dict[str, _Classes]]) -> FolderListing:
    splits = {}
    for domain, classes in found.items():
        splits[domain] = _by_part(tree, {f"{domain}/{split}": images for split, images in classes.items()})
    first, *others = splits
    for domain in others:
        if set(splits[domain]) != set(splits[first]):
            raise tree.refusal(
                f'domain "{first}" has {_several(list(found[first]))}, domain "{domain}" has '
                f"{_several(list(found[domain]))}; expected the same splits in all domains"
            )
    names = _common_classes(tree, {domain: parts["train"] for domain, parts in splits.items()})
    domains = {domain: _parts(tree, parts, names, f"folder/{domain}", domain) for domain, parts in splits.items()}
    cut = None if "val" in splits[first] else _rule(TRAIN_FRACTIONS, "folder/<domain>")
    return _checked(tree, names, domains, OF_DOMAINS_OF_SPLITS, cut)


def _as_domains(tree: _Tree, found: dict[str, _Classes]) -> FolderListing:
    names = _common_classes(tree, found)
    domains = {d: _cut(_labelled(classes, names), WHOLE_FRACTIONS, f"folder/{d}") for d, classes in found.items()}
    return _checked(tree, names, domains, OF_DOMAINS, _rule(WHOLE_FRACTIONS, "folder/<domain>"))


def _by_part(tree: _Tree, found: dict[str, _Classes]) -> dict[str, _Classes]:
    """part -> classes of one domain, from split (a path below the root) -> classes."""
    splits = {SPLITS[top.rpartition("/")[2].lower()]: classes for top, classes in found.items()}
    if len(splits) < len(found):
        raise tree.refusal(f"{_several(list(found))} name one split twice")
    if "train" not in splits or len(splits) < 2:
        raise tree.refusal(f"found {_several(list(found))}; expected train and test (or val)")
    if "test" not in splits:
        splits["test"] = splits.pop("val")
    return splits


def _parts(tree: _Tree, splits: dict[str, _Classes], names: list[str], salt: str, domain: str = "") -> Listing:
    """The three parts of one domain; val is cut from train where there is none."""
    where = f' of domain "{domain}"' if domain else ""
    for part, classes in splits.items():
        unknown = sorted(set(classes) - set(splits["train"]))
        if unknown:
            raise tree.refusal(f'class "{unknown[0]}" is in {part} but not in train{where}')
    parts = {part: _labelled(classes, names) for part, classes in splits.items()}
    if "val" not in parts:
        parts |= _cut(parts["train"], TRAIN_FRACTIONS, salt)
    return parts


def _common_classes(tree: _Tree, found: dict[str, _Classes]) -> list[str]:
    """The classes of all domains, sorted; refuses where one lacks some."""
    names = sorted({c for classes in found.values() for c in classes})
    for domain, classes in found.items():
        lacking = [c for c in names if c not in classes]
        if lacking:
            having = next(d for d in found if lacking[0] in found[d])
            # another spelling of the class is one that some other domain lacks in turn
            odd = [c for c in classes if any(c not in others for others in found.values())]
            raise tree.refusal(
                f'domain "{domain}" has no class folder "{lacking[0]}", which domain "{having}" has; '
                f"all domains need the same classes (in {OF_CLASSES} no folder of images has folders beside it)"
                f"{nearest(lacking[0], odd)}"
            )
    return names


def _labelled(classes: _Classes, names: list[str]) -> list[tuple[str, int]]:
    label = {name: number for number, name in enumerate(names)}
    return [(path, label[c]) for c in sorted(classes) for path in classes[c]]


def _cut(images: list[tuple[str, int]], fractions: dict[str, float], salt: str) -> Listing:
    where = stratified(np.array([label for _, label in images]), fractions, salt)
    return {part: [images[i] for i in index] for part, index in where.items()}


def _rule(fractions: dict[str, float], salt: str) -> dict[str, Any]:
    """What a manifest says of a cut."""
    return {"rule": "stratified by class", "fractions": fractions, "salt": salt}


def _checked(
    tree: _Tree, names: list[str], domains: dict[str, Listing], layout: str, cut: dict[str, Any] | None
) -> FolderListing:
    if len(names) < 2:
        raise tree.refusal(f'one class, "{names[0]}"; expected two or more')
    for domain, parts in domains.items():
        for part in PARTS:
            if not parts[part]:
                where = f'domain "{domain}" of ' if domain else ""
                raise ValueError(f'{where}folder "{tree.root}": too few images per class to cut a {part} part')
    return FolderListing(names, domains, False, tree.sizes, tree.notes, layout, cut)


def _splits(names: list[str]) -> list[str]:
    return [name for name in names if name.lower() in SPLITS]


def _several(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
