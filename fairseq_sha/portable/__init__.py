"""SHA-RNN in integers: packs, unpacks and generates the same bytes on every machine.

Needs numpy, and numba for speed; neither torch nor fairseq. ``fairseq-sha quantize`` makes the file
of a model from a checkpoint.
"""

import logging
import random

from fairseq_sha.errors import UserError
from fairseq_sha.packed_file import check_numbers, stream_length
from fairseq_sha.portable.model import (
    NORM_BITS,
    TOTAL_BITS,
    is_portable_file,
    read,
)

__all__ = ["PortableModel", "check_temperature", "is_portable_file", "load"]

logger = logging.getLogger(__name__)

#: Temperatures from which the integers of logits keep all their bits. Models in floating point have
#: the same limits, within which their probabilities are finite.
TEMPERATURES = (0.01, 100.0)


def check_temperature(temperature):
    """Raise a UserError for a temperature out of range."""
    least, most = TEMPERATURES
    if not least <= temperature <= most:
        raise UserError(f"--temperature {temperature}: must be from {least} to {most:g}")


def load(path):
    """The :class:`PortableModel` of a file that ``fairseq-sha quantize`` wrote.

    Raises:
        OSError: it cannot be read
        UserError: it is no such file, or damaged
    """
    return PortableModel(read(path))


class PortableModel:
    """Packs and unpacks blocks of bytes, and continues a text.

    Args:
        model (~fairseq_sha.portable.model.IntegerModel): the numbers
        form (type): :class:`~fairseq_sha.portable.numba_form.NumbaForm` or
            :class:`~fairseq_sha.portable.numpy_form.NumpyForm`, which give the same bytes; None for
            the first if numba is installed
    """

    def __init__(self, model, form=None):
        self.model = model
        #: 8 bytes that differ between models.
        self.identity = model.identity
        #: Of the installation that a packed file is bound to: none.
        self.build = bytes(8)
        self._form = (form or _fastest_form())(model)

    def encode(self, data, streams, progress=None):
        """Pack a block. Its state is fresh, so that a block can be unpacked alone.

        Args:
            data (bytes): any
            streams (int): the block is cut into so many parts of ``ceil(len(data) / streams)``
                bytes, which are read side by side; the last ones may be shorter or empty
            progress (callable): is given a number of bytes whenever so many more are done

        Returns:
            bytes: without the size, the number of streams or a checksum
        """
        return self._form.encode(data, _useful(len(data), streams), progress)

    def decode(self, payload, size, streams, progress=None):
        """Unpack a block of ``size`` bytes. Arguments as for :meth:`encode`. A payload that
        :meth:`encode` did not make gives some other bytes."""
        return self._form.decode(bytes(payload), size, _useful(size, streams), progress)

    def generate(self, prompt, length, seed=None, temperature=1.0, progress=None):
        """What may follow a prompt: bytes that the model knows, drawn from its probabilities. The
        same seed gives the same bytes on every machine.

        Args:
            prompt (bytes): may be empty
            length (int): bytes
            seed (int): of random numbers; None for a random one
            temperature (float): by which logits are divided, rounded to 16 bits after the point

        Raises:
            UserError: a temperature out of range
        """
        check_temperature(temperature)
        numbers = random.Random(seed)
        draws = [numbers.getrandbits(TOTAL_BITS) for _ in range(length)]
        factor = round((1 << NORM_BITS) / temperature)
        return self._form.generate(prompt, draws, factor, progress)


def _fastest_form():
    try:
        import numba  # noqa: F401
    except ImportError:
        from fairseq_sha.portable.numpy_form import NumpyForm

        logger.warning("numba is missing, so this is slow; pip install 'fairseq-sha[portable]'")
        return NumpyForm
    from fairseq_sha.portable.numba_form import NumbaForm

    return NumbaForm


def _useful(size, streams):
    """As many streams as there are parts that are not empty, or one."""
    check_numbers(streams=streams)
    return -(-size // stream_length(size, streams)) if size else 1
