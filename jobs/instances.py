"""GPUs, disk and price of SageMaker's instance types; `None`: unknown."""

import datetime
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import write_json

TABLE = Path(__file__).with_name("instances.json")


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    gib: float  # of memory, as nvidia-smi shows it
    capability: float  # CUDA's


GPU_OF = {  # by family
    "p2": Gpu("K80", 11.2, 3.7),
    "p3": Gpu("V100", 15.8, 7.0),
    "p3dn": Gpu("V100", 31.7, 7.0),
    "g4dn": Gpu("T4", 15.0, 7.5),
    "g5": Gpu("A10G", 22.5, 8.6),
    "g6": Gpu("L4", 22.5, 8.9),
    "g6e": Gpu("L40S", 45.0, 8.9),
    "p4d": Gpu("A100", 40.0, 8.0),
    "p4de": Gpu("A100", 80.0, 8.0),
    "p5": Gpu("H100", 79.6, 9.0),
    "p5e": Gpu("H200", 140.4, 9.0),
    "p5en": Gpu("H200", 140.4, 9.0),
}
# GPUs by family and size, from AWS's pages of instance types; "" is any other size.
GPUS = {
    "g4dn": {"12xlarge": 4, "metal": 8, "": 1},
    "g5": {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8, "": 1},
    "g6": {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8, "": 1},
    "g6e": {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8, "": 1},
    "p2": {"8xlarge": 8, "16xlarge": 16, "": 1},
    "p3": {"8xlarge": 4, "16xlarge": 8, "": 1},
    "p3dn": {"": 8},
    "p4d": {"": 8},
    "p4de": {"": 8},
    "p5": {"4xlarge": 1, "": 8},
    "p5e": {"": 8},
    "p5en": {"": 8},
}
WITHOUT_GPU = re.compile(r"[cmrt]\d")  # families
LOCAL_DISK = re.compile(r"(g4dn|g5|g6e?|p3dn|p4de?|p5(en?)?|[cmr]\d+\w*d\w*)$")  # of families
HOUR_OF_TRAINING = re.compile(r"(?:^|-)Train:(ml\.\S+)$")  # its usage type in the price list


def _family_and_size(instance_type: str) -> tuple[str, str]:
    _, family, size = [*instance_type.split("."), "", ""][:3]
    return family, size


def num_gpus(instance_type: str) -> int | None:
    """GPUs of one instance."""
    family, size = _family_and_size(instance_type)
    if family in GPUS:
        return GPUS[family].get(size, GPUS[family][""])
    return 0 if WITHOUT_GPU.match(family) else None


def has_local_disk(instance_type: str) -> bool:
    """Whether it has its own, encrypted disk: SageMaker then refuses a key for the volume."""
    return bool(LOCAL_DISK.match(_family_and_size(instance_type)[0]))


def price(instance_type: str, region: str, table: Path = TABLE) -> tuple[float, str] | None:
    """On-demand price of one instance in USD an hour, and the date of that price."""
    prices = json.loads(table.read_text(encoding="utf-8"))["regions"].get(region, {})
    usd = prices.get("usd_an_hour", {}).get(instance_type)
    return None if usd is None else (usd, prices["date"])


def refresh(client: Any, region: str, table: Path = TABLE) -> int:
    """Write a region's prices of today into the table; returns the number of instance types.

    Args:
        client: of the AWS price list API, which answers in us-east-1 only.
    """
    prices = {}
    pages = client.get_paginator("get_products").paginate(
        ServiceCode="AmazonSageMaker",
        Filters=[{"Type": "TERM_MATCH", "Field": "regionCode", "Value": region}],
    )
    for page in pages:
        for text in page["PriceList"]:
            product = json.loads(text)
            match = HOUR_OF_TRAINING.search(product["product"]["attributes"].get("usagetype", ""))
            if not match:
                continue
            for term in product["terms"].get("OnDemand", {}).values():
                for dimension in term["priceDimensions"].values():
                    prices[match[1]] = float(dimension["pricePerUnit"]["USD"])
    if prices:
        content = json.loads(table.read_text(encoding="utf-8"))
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        content["regions"][region] = {"date": today, "usd_an_hour": dict(sorted(prices.items()))}
        write_json(table, content)
    return len(prices)
