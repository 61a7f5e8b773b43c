from tests.redis.test_limit_kinds import *  # noqa: F403
