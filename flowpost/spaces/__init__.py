"""Label spaces: which values a label may take, and its chart to the plane of the flow."""

from .base import Block, Placement, Scale, Space, SpaceConstraint, space_from_config
from .circle import Circle
from .product import Product
from .real import Interval, Positive, Real
from .sphere import Sphere

__all__ = [
    "Block",
    "Circle",
    "Interval",
    "Positive",
    "Placement",
    "Product",
    "Real",
    "Scale",
    "Space",
    "SpaceConstraint",
    "Sphere",
    "space_from_config",
]
