"""Abuse: who guesses, stuffs, scans and hammers; said in the log, and banned where a rule says so."""

from stillroom.abuse.abuse import Abuse, AsyncAbuse
from stillroom.abuse.ban import Ban
from stillroom.abuse.body import LOG_TASK, AbuseBody
from stillroom.abuse.rules import Rule

__all__ = ["LOG_TASK", "Abuse", "AbuseBody", "AsyncAbuse", "Ban", "Rule"]
