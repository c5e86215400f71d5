"""What can go wrong in a kernel.

KernelError
├── MixtureError   tensors that do not fit together, or values out of range; raised before anything runs
└── BackendError   the backend that was asked for does not exist or cannot run here
"""

from __future__ import annotations


class KernelError(Exception):
    """Any failure of a kernel."""


class MixtureError(KernelError, ValueError):
    """The tensors of a call do not fit together, or a value is out of range."""


class BackendError(KernelError):
    """The backend that was asked for does not exist or cannot run here."""
