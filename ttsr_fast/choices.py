"""Values of options, for the modules that take them and for the help of the command line.

Nothing is imported here.
"""

BACKENDS = ("cpp", "triton", "torch", "reference")  # in order of preference
PRECISIONS = ("fp32", "fp16x3", "fp16", "bf16", "tf32")
METHODS = ("detail", "ttsr")
PHASES = (1, 2, 4)
DEFAULT_PHASES = 2
AMP = ("bf16", "fp16")
LAYOUTS = ("cufed", "cufed5", "sun80", "urban100", "manga109", "folders")  # of data sets
EVALUATED = ("detail", "bicubic")  # methods without a model
REFERENCES = ("first", "all", "stack")  # use of several references in an evaluation
PROTOCOLS = ("ttsr", "mmagic", "c2")  # of PSNR and SSIM
CHECKPOINTS = ("official", "mmagic")  # projects that name the tensors
