-- Processes may keep copies of the values whose keys begin with one of the prefixes in the registry: an id, and a
-- prefix a line. A script that changes such a value moves the clock on and names the key, so that a process with a copy
-- reads it anew. A change by a tag or a pattern is told by its mark.
-- The names are bounded: enough for a process that asks often. `!` tells since when they are complete, and `K` in the
-- marks how new the newest must be, so a loss of names shows, also once there are new ones. Another id tells that the
-- registry itself was lost, and with it changes that no process was told of.

local NAMES_LIMIT = 10000
local NAMES_DROPPED = 1000
local NAMES_MS = 600000 -- no copy is kept for half as long

local function may_be_kept(registry, name)
  for prefix in string.gmatch(registry, '\n([^\n]*)') do
    if string.sub(name, 1, #prefix) == prefix then
      return true
    end
  end
  return false
end

-- Names the keys among these that a process may keep. `begin`: the epoch to begin where the clock or the marks are lost.
-- Returns the clock before this and the new one, '' and '' if it was not moved.
local function name_changed(near, named, clock, marks, begin, names)
  local registry = redis.call('GET', near)
  if not registry then
    return '', ''
  end
  local kept = {}
  for _, name in ipairs(names) do
    if may_be_kept(registry, name) then
      kept[#kept + 1] = name
    end
  end
  if #kept == 0 then
    return '', ''
  end
  local epoch, seq, _, before = next_moment(clock, marks, begin)
  local score = plain(seq)
  if redis.call('EXISTS', named) == 0 then
    redis.call('ZADD', named, redis.call('ZSCORE', marks, 'K') or '0', '!')
  end
  for _, name in ipairs(kept) do
    redis.call('ZADD', named, score, 'k:' .. name)
  end
  local more = redis.call('ZCARD', named) - NAMES_LIMIT
  if more > NAMES_DROPPED then
    local upto = redis.call('ZRANGE', named, more - 1, more - 1, 'WITHSCORES')[2]
    redis.call('ZREMRANGEBYSCORE', named, '-inf', upto)
    redis.call('ZADD', named, upto, '!')
  end
  redis.call('PEXPIRE', named, NAMES_MS)
  redis.call('ZADD', marks, score, 'K')
  return before, write_clock(clock, marks, epoch, seq)
end
