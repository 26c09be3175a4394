"""The one exception that means "the user can mend this".

The command line prints its message as one sentence and exits with code 2. Every other
exception is a bug of ours and keeps its traceback.
"""


class UserError(ValueError):
    """Bad input. The message names the value, the place and the mend."""
