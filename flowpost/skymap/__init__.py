"""Sky maps of direction posteriors: credible areas, cones, flat and multi-order FITS.

sky = fp.skymap.multiorder(q[0], rotation=R)      # q: a posterior of fp.Sphere()
sky.area(0.9)                                     # square degrees
sky.write("event.multiorder.fits")
"""

from .build import DirectionPosterior, flat, multiorder, read
from .frames import detector_rotation, galactic_rotation
from .result import SkyMap

__all__ = [
    "DirectionPosterior",
    "SkyMap",
    "detector_rotation",
    "flat",
    "galactic_rotation",
    "multiorder",
    "read",
]
