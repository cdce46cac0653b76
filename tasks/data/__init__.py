"""Data sets by name: built-in ones, torchvision's once prepared (some joined as domains), and folders of images.

data = load("glyphs", data_dir, classes=600)       # -> ImageData(train, val, test, mean, std, ...)
domains = load_domains("digits", data_dir)         # -> {domain: ImageData}
check_domains("digits", data_dir, domains)         # ValueError where they lack a class, before anything runs
prepare("cifar10", data_dir)                       # the only call that downloads or decodes
register_dataset("mine", InMemory(function, num_classes=10, title="Mine"))

What there is
    catalog.py     names of data sets: what they are, where they are, how they are loaded
    source.py      what the catalog needs of a data set; each kind is a Source of tasks.data.sources or a plugin
    listing.py     what `data list` shows
What a task reads
    images.py      images and labels in parts
    batches.py     batches and augmentation
    reading.py     batches of a part, in memory or decoded while it is read
    lazy.py        sets too large for memory
    crops.py       random crops of whole images, cut where files are decoded
    stream.py      batches without end
    episodes.py    few-shot episodes
What `data prepare` does
    archives.py    publishers' archives: downloaded or given, verified, read
    folders.py     folders of images: what they hold becomes a set
    layout.py      classes, parts and domains of a folder, by the names below its root
    decoding.py    an image file becomes uint8 RGB of one size
    duplicates.py  images that stand in two parts
    origin.py      what a prepared folder was made from
    prepared.py    the cache of prepared sets
    manifest.py    what describes a prepared set
    store.py       array files that are verified when they are read
    swap.py        two folders change places at once
    rebuild.py     the built-in files anew, byte for byte
"""

from tasks.data.batches import (
    AUGMENTATIONS,
    Augmentation,
    augment,
    cutout,
    normalize,
    ordered_batches,
    shuffled_batches,
)
from tasks.data.catalog import (
    check_batch_size,
    check_classifiable,
    check_disjoint,
    check_domains,
    checksum,
    class_counts,
    dataset_info,
    dataset_names,
    domain_labels,
    domain_names,
    in_memory,
    is_prepared,
    load,
    load_disjoint,
    load_domains,
    open_folder,
    prepare,
    register_dataset,
)
from tasks.data.images import ImageData, Split, shrink
from tasks.data.lazy import FolderData, FolderImages, loaded_batches
from tasks.data.listing import Listed, listed
from tasks.data.source import Contents, DatasetInfo, Preparation, Source
from tasks.data.sources.memory import InMemory

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Contents",
    "DatasetInfo",
    "FolderData",
    "FolderImages",
    "ImageData",
    "InMemory",
    "Listed",
    "Preparation",
    "Source",
    "Split",
    "augment",
    "check_batch_size",
    "check_classifiable",
    "check_disjoint",
    "check_domains",
    "checksum",
    "class_counts",
    "cutout",
    "dataset_info",
    "dataset_names",
    "domain_labels",
    "domain_names",
    "in_memory",
    "is_prepared",
    "listed",
    "load",
    "load_disjoint",
    "load_domains",
    "loaded_batches",
    "normalize",
    "open_folder",
    "ordered_batches",
    "prepare",
    "register_dataset",
    "shrink",
    "shuffled_batches",
]
