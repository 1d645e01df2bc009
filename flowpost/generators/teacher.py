r"""The teacher: a masked autoregressive flow over many columns, conditional on labels.

.. math:: \ln p_T(x|z) = \ln N(u; 0, I) + \ln |\det \partial u / \partial x|, \qquad
          u = f(x; z) ,

in one pass of the networks; a draw :math:`x = f^{-1}(u; z)` takes one pass for each column, which a
`Student` does without. It is trained by maximum likelihood (`flowpost.generators.fit`), and is the
density that the student's draws are weighted to.

Sources: *Masked autoregressive flow for density estimation*, G. Papamakarios, T. Pavlakou,
I. Murray, 2017, https://arxiv.org/abs/1705.07057; *CaloFlow*, C. Krause, D. Shih, 2021,
https://arxiv.org/abs/2106.05285.
"""

from __future__ import annotations

from typing import Any

from ..spaces import Space, space_from_config
from .columns import Columns

__all__ = ["Teacher"]


class Teacher(Columns):
    """A masked autoregressive flow over columns x, conditional on labels.

    Arguments:
        space: The label space.
        data: Columns of x, or their space where they are not all real. Real and positive ones are
            whitened column by column.
        layers: Layers of the flow.
        bins: Bins of the splines.
        hidden: Units of a hidden layer of each masked network.
        depth: Hidden layers of each masked network.
        context: Features between labels and flow.
        label_hidden: Units of a hidden layer of the network that reads the labels.
        label_layers: Its hidden layers.

    Raises:
        ValueError: If an option is out of range, or the data are directions or angles.

    Example:
        >>> import torch, flowpost as fp
        >>> from flowpost.generators import Teacher
        >>> teacher = Teacher(fp.Real(2), data=5)
        >>> z = torch.zeros(3, 2)
        >>> teacher.log_prob(teacher.sample(z), z).shape
        torch.Size([3])
    """

    def __init__(
        self,
        space: Space,
        data: int | Space,
        *,
        layers: int = 2,
        bins: int = 8,
        hidden: int = 128,
        depth: int = 2,
        context: int = 64,
        label_hidden: int = 64,
        label_layers: int = 2,
    ) -> None:
        super().__init__(
            space,
            data,
            False,
            layers=layers,
            bins=bins,
            hidden=hidden,
            depth=depth,
            context=context,
            label_hidden=label_hidden,
            label_layers=label_layers,
        )

    @classmethod
    def _build(cls, options: dict[str, Any]) -> Teacher:
        return cls(**{**options, "data": space_from_config(options["data"])})
