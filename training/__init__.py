"""Meta-training, adaptation, calibration and measurement."""

import logging

# PEFT imports bitsandbytes wherever it is installed, which then says on some CPUs that it could download kernels.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
