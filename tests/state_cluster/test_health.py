from tests.redis.test_health import *  # noqa: F403
