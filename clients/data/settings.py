"""Which images a client holds, as settings. Imports nothing heavy: ``--help`` must be quick."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from secure_fedprompt.protocol.settings import Count, DataPath, FilePath, Positive, Rate


class DataSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which images a client holds.

    Attributes:
        dataset: "generated", a folder or zip file (CLASS/IMAGE), or a torchvision name.
        data_root: where torchvision data sets lie.
        download: fetch a missing torchvision data set.
        class_list: text file with one class name a line, the same at every client; needed where
            a client lacks some classes.
        test_share: part of each class held out for testing if the data have no test split.
        shots: training images per class, 0 for all, drawn before the partition.
        styles: of the generated set, comma-separated.
        generated_classes: how many of its classes.
        per_class: training pictures of each class and style of the generated set.
        test_per_class: test pictures of each of them.
        classes: "all", or the "base" or "novel" half of the sorted class names.
        partition: how a shared data set is dealt out: iid, pathological, overlap, dirichlet, domain
            or domain-dirichlet.
        part: which share this client takes, from 0.
        parts: into how many shares the data set is dealt out; 1 takes everything.
        beta: concentration of the Dirichlet partitions.
        rho: share of classes that all clients have, partition overlap.
        data_seed: of all these draws.
    """

    dataset: DataPath = "generated"
    data_root: FilePath = "data"
    download: bool = False
    class_list: FilePath = ""
    test_share: Annotated[float, Meta(ge=0, le=1)] = 0.3
    shots: Count = 0
    styles: str = "photo,poster,sketch,neon"
    generated_classes: Positive = 32
    per_class: Positive = 16
    test_per_class: Positive = 8
    classes: str = "all"
    partition: str = "iid"
    part: Count = 0
    parts: Positive = 1
    beta: Rate = 0.3
    rho: Annotated[float, Meta(ge=0, le=1)] = 0.2
    data_seed: Count = 0
