from tests.redis.test_dead_letters import *  # noqa: F403
