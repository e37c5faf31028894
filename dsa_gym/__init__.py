"""dsa-gym: reinforcement-learning environments and agents for gating Dynamic Sparse Adapters.

Importing the package registers its environments with Gymnasium; nothing heavier is loaded.
"""

from importlib.metadata import version

from dsa_gym.envs import register

__version__ = version("dsa-gym")

register()
