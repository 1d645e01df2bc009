"""Label spaces: which values a label may take, and its chart to the plane of the flow."""

from .base import Block, Scale, Space, SpaceConstraint, space_from_config
from .product import Product
from .real import Interval, Positive, Real

__all__ = [
    "Block",
    "Interval",
    "Positive",
    "Product",
    "Real",
    "Scale",
    "Space",
    "SpaceConstraint",
    "space_from_config",
]
