"""placeholder to be replaced"""


class UserError(Exception):
    """Bad input from the user: one line that says what is wrong, where, and what to do (exit code 2)."""
