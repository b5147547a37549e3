"""Errors that the user can act on, each with the exit code of the launcher."""

from .protocol import BAD_INPUT, FAILED, PREFLIGHT_FAILED


class LaunchError(Exception):
    """Something went wrong while launching."""

    exit_code = FAILED


class SpecError(LaunchError):
    """A job, a site, a template or a command line is wrong; nothing was submitted."""

    exit_code = BAD_INPUT


class PreflightError(LaunchError):
    """A machine is not fit for the job; nothing was started."""

    exit_code = PREFLIGHT_FAILED
