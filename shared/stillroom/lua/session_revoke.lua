-- Ends all sessions of a user or a tag. A few are deleted here; if there are more, all are dead from now on
-- (`rev`), and a worker deletes them.
-- KEYS  1 index  2… record to keep, under each pepper
-- ARGV  1 prefix  2 u:<user> or g:<tag>  3 most to delete here  4 how long ago it was asked for, µs; '' where the record
--       to keep is named by its handle: the list that showed it may be minutes old, and it opens nothing
-- returns {how many ended that lived, 1 if there is work left}, or, where nothing was done,
--         {-1, how long before it was asked for the grace of the name to keep was over, µs}
-- include: time session session_index

local prefix, now, most = ARGV[1], now_us(), tonumber(ARGV[3])
local index = table.remove(KEYS, 1)
-- Keeps only a living session: a new stamp would bring back a session that was revoked a moment ago.
local asked = ARGV[4] == '' and 0 or now - tonumber(ARGV[4])
local kept, _, _, late = find(prefix, now, KEYS, asked, ARGV[4] == '' and HOPS_TO_END or HOPS)
if late then
  return {-1, plain(late)}
end
if kept and not redis.call('ZSCORE', index, kept.h) then
  kept = nil
end
local ended, found = 0, {}
for _, h in ipairs(redis.call('ZRANGE', index, 0, most - 1)) do
  local session = read_record(prefix, h)
  if not session then
    redis.call('ZREM', index, h) -- its record is gone; the sweep cleans up after it elsewhere
  elseif not (kept and kept.h == h) then
    ended = ended + (lives(prefix, session, now) and 1 or 0)
    found[#found + 1] = session
  end
end
drop_all(prefix, found)
local left = kept and 1 or 0
if redis.call('ZCARD', index) == left then
  return {ended, 0}
end

local before = math.max(
  tonumber(redis.call('ZSCORE', prefix .. 'rev', ARGV[2]) or '0'), tonumber(redis.call('GET', prefix .. 'all') or '0'))
ended = ended + redis.call('ZCOUNT', index, '(' .. plain(before), '+inf') - left
local life = redis.call('PTTL', index)
if life < 0 then -- a stranger took its end away
  life = LONGEST_MS
  keep_for(index, life)
end
redis.call('ZADD', prefix .. 'rev', next_stamp(prefix, now, life), ARGV[2])
keep_for(prefix .. 'rev', life)
if kept then
  local stamp = next_stamp(prefix, now, life)
  redis.call('HSET', kept.key, '_s', stamp)
  for _, name in ipairs(indexes_of(kept)) do
    redis.call('ZADD', prefix .. name, 'XX', stamp, kept.h)
  end
end
return {ended, 1}
