"""Purified task vectors (PAVE, arXiv 2510.14697) for stock mergekit."""

from mergekit_pave.errors import PaveError as PaveError
from mergekit_pave.plugin import register as register
