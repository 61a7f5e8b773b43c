from tests.redis.test_limit_names import *  # noqa: F403
