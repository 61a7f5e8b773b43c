"""Run the suites of sessions, limits, abuse and health on a cluster of three nodes, with the same fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom.embedded import EmbeddedServer
from tests.conftest import face_of
from tests.support import cluster_fixtures
from tests.support.cluster import RedisCluster
from tests.support.spread_client import SpreadClient

shared_cluster, cluster = cluster_fixtures.shared_cluster, cluster_fixtures.cluster
shared_single_server = cluster_fixtures.shared_single_server
single_server = cluster_fixtures.single_server

HERE = Path(__file__).parent
# Tests of these suites that are about one server, and what of it is not so here.
NOT_HERE = {
    "it is about the commands, keys or clock of one server": (
        "test_a_report_is_one_round_trip",
        "test_no_line_and_no_key_holds_a_name_or_a_token",
        "test_changes_are_read_once_a_second_and_with_a_check",
        "test_windows_are_compared_once_and_then_now_and_then",
        "test_a_check_is_one_round_trip",
        "test_what_can_be_no_session_is_refused",
        "test_denials_from_memory_are_told_with_the_next_one",
        "test_every_operation_is_one_round_trip",
        "test_what_is_no_token_costs_no_round_trip",
        "test_no_session_and_no_error_shows_its_token",
        "test_a_create_that_was_sent_twice_is_one_session",
        "test_a_network_may_be_exempt",
        "test_limits_and_session_are_one_round_trip",
        "test_a_flood_of_the_denied_costs_redis_nothing",
        "test_strange_cookies_are_as_good_as_none",
        "test_a_request_that_does_not_look_costs_nothing",
        "test_nothing_is_written_until_there_is_data",
        "test_the_next_request_reads_it_in_one_round_trip_and_sets_no_cookie",
        "test_looking_at_a_list_writes_nothing",
        "test_in_order_the_count_is_exact",
        "test_a_command_that_arrives_late_takes_nothing",
        "test_orders_of_megabytes_have_a_deadline_each",
    ),
    "events and bans are in several shards, in orders of their own": (
        "test_an_event_is_written_down",
        "test_a_pattern_is_a_line_and_an_entry",
        "test_entries_that_the_stream_lost_are_not_pending_for_ever",
        "test_an_event_that_nobody_finishes_is_set_aside",
        "test_an_error_in_judging_leaves_the_events",
        "test_twenty_thousand_events_keep_little",
        "test_events_that_are_counted_together_count_as_one_by_one",
        "test_bans_have_a_cap",
        "test_an_event_that_is_read_again_bans_once",
    ),
    "the cache and the broker are on another server": (
        "test_a_report_has_every_part",
        "test_what_happened_is_counted_by_the_minute",
        "test_totals_only_grow",
        "test_waiting_work_is_seen",
        "test_work_of_any_priority_is_seen",
        "test_a_time_that_no_clock_has_said_is_none",
        "test_a_load_that_is_shed_is_no_try",
        "test_junk_among_our_keys_is_passed_over",
        "test_hostile_junk_costs_no_report",
        "test_two_servers_are_reported_by_their_roles",
        "test_another_broker_is_not_looked_into",
        "test_these_rights_are_all_it_takes",
    ),
    "it fills, or looks at, the memory of one server": (
        "test_rates_are_differences_of_one_server_run",
        "test_a_snapshot_is_kept_when_memory_is_full",
        "test_a_full_server_ends_sessions_and_begins_none",
    ),
}
NO_TESTS_HERE = {name: why for why, names in NOT_HERE.items() for name in names}


# What a session may hold is decided before Redis is asked.
KNOWN_ELSEWHERE = "test_session_bounds.py"
# The files that run with both faces.
BOTH_FACES = {"test_locks.py", "test_slots.py", "test_start.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests about one server. The others run on one kind of it: without a cluster both kinds run them."""
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.any_server)
            name = item.path.name
            if name == KNOWN_ELSEWHERE or (name not in BOTH_FACES and face_of(item) == "async"):
                item.add_marker(pytest.mark.full)
        why = NO_TESTS_HERE.get(getattr(item, "originalname", item.name))
        if why and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"on a cluster {why}"))


@pytest.fixture
def server(single_server: EmbeddedServer) -> EmbeddedServer:
    """Return the server of the cache, without data."""
    return single_server


@pytest.fixture
def client(cluster: RedisCluster) -> Iterator[Any]:
    """Return a plain client that finds each key's node."""
    with SpreadClient.from_url(cluster.url) as client:
        yield client


@pytest.fixture
def places(cluster: RedisCluster, server: EmbeddedServer) -> dict[str, Any]:
    """Return the settings that say where Redis is."""
    urls = {"redis_url": cluster.url, "cache_url": server.url, "broker_url": server.url}
    return urls | {"state_cluster": True}
