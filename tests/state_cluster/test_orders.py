from tests.redis.test_orders import *  # noqa: F403
