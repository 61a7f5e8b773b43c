from tests.redis.test_webhook import *  # noqa: F403
