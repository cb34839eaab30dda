"""Rewards of sampled responses: functions, models, endpoints, judges."""

from __future__ import annotations

from una_fast.lazy import lazy_names

_PUBLIC = {
    "Rewards": "total",
    "RewardError": "settings",
    "RewardsDown": "settings",
    "parse_rewards": "settings",
}
__all__ = [*_PUBLIC]
__getattr__ = lazy_names(__name__, _PUBLIC)
