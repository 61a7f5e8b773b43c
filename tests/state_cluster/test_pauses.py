from tests.redis.test_pauses import *  # noqa: F403
