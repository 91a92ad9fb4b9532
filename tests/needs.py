"""What some tests need and not every machine has: without it they are skipped and say so.

The marks are a test's first decorator: without what they name, a test of many cases is one skip.
"""

import os
import shutil
import sys

import pytest
import torch

try:
    from k_diffusion import sampling as k_sampling
except Exception as error:  # a broken one raises anything
    k_sampling = None
    absent = f"needs k-diffusion, which pip leaves out from Python 3.13 on ({error})"
else:
    absent = ""


def _only(there, reason):
    def mark(test):
        if there:
            return test

        @pytest.mark.skip(reason=reason)
        def skipped():
            pass

        skipped.__name__, skipped.__doc__ = test.__name__, test.__doc__
        return skipped

    return mark


_cxx = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
compiler = _only(shutil.which(_cxx), f"needs a C++ compiler ({_cxx})")
cuda = _only(torch.cuda.is_available(), "needs a CUDA device")
k_diffusion = _only(k_sampling, absent)


def case(*values):
    """One case of a test, which alone needs k-diffusion."""
    return pytest.param(*values, marks=pytest.mark.skipif(k_sampling is None, reason=absent))


def namesake(solver):
    """k-diffusion's sampler of the same name, None if there is none."""
    return getattr(k_sampling, f"sample_{solver.name}", None)
