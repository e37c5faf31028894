"""Readers of users' data: texts, interactions and images, and the split of users."""

from dsa_gym.data.texts import DataError, UserTexts, read_lines, read_texts, split_users

__all__ = ["DataError", "UserTexts", "read_lines", "read_texts", "split_users"]
