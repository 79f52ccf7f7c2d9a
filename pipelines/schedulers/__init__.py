"""Schedulers whose steps have an exact inverse: from noise to a picture and back to the same noise.

    from visattn.pipelines.schedulers import BDIAInverseScheduler, BDIAScheduler

`EDICTScheduler` and `BDIAScheduler` take the place of DDIM and of flow matching by Euler steps, in any pipeline.
"""

from visattn.pipelines.schedulers.bdia import BDIAInverseScheduler, BDIAScheduler
from visattn.pipelines.schedulers.edict import EDICTInverseScheduler, EDICTScheduler
from visattn.pipelines.schedulers.exact import ExactScheduler

__all__ = ["BDIAInverseScheduler", "BDIAScheduler", "EDICTInverseScheduler", "EDICTScheduler", "ExactScheduler"]
