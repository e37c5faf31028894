"""Readers of users' data: texts, interactions and images, and the split of users."""

from dsa_gym.data.fetch import DownloadLimits
from dsa_gym.data.images import ImageReport, UserImages, read_images
from dsa_gym.data.interactions import InteractionReport, UserInteractions, read_interactions
from dsa_gym.data.privacy import Scrubber
from dsa_gym.data.splits import split_users
from dsa_gym.data.tables import DataError, Row, read_lines, read_rows
from dsa_gym.data.texts import UserTexts, read_texts
from dsa_gym.data.titles import read_titles

__all__ = [
    "DataError",
    "DownloadLimits",
    "ImageReport",
    "InteractionReport",
    "Row",
    "Scrubber",
    "UserImages",
    "UserInteractions",
    "UserTexts",
    "read_images",
    "read_interactions",
    "read_lines",
    "read_rows",
    "read_texts",
    "read_titles",
    "split_users",
]
