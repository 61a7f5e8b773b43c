from tests.redis.test_reclaim import *  # noqa: F403
