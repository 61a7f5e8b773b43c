from tests.redis.test_health_time import *  # noqa: F403
