-- Writes a session's indexes, and deletes the session from them. Include it behind `session`.

local LONGEST_MS = 366 * 86400000 -- no session is longer
local FOREVER = '9007199254740991'
local BEGUN = 'begun'
local LATE_MS = 60000 -- a response that began before a login may still be under way

local function keep_for(key, ms)
  if redis.call('PTTL', key) < ms then
    redis.call('PEXPIRE', key, plain(ms))
  end
end

-- Returns what a command says of a key, or nil for a key of another type: a stranger has written it.
local function asked_of(command, key, ...)
  local said = redis.pcall(command, key, ...)
  if type(said) == 'table' and said.err then
    if not string.find(said.err, 'WRONGTYPE', 1, true) then
      error(said.err)
    end
    return nil
  end
  return said
end

-- `life`: the sessions that it orders are gone after so many ms.
local function next_stamp(prefix, now, life)
  local newest = number(asked_of('GET', prefix .. 'clock')) or 0
  local stamp = plain(math.max(now, newest + 1))
  redis.call('SET', prefix .. 'clock', stamp, 'KEEPTTL')
  keep_for(prefix .. 'clock', life)
  return stamp
end

local function member_of(h, user, tags)
  return h .. '\n' .. user .. '\n' .. tags
end

-- Returns nil for a member that is not ours.
local function read_member(member)
  local first = string.find(member, '\n', 1, true)
  local second = first and string.find(member, '\n', first + 1, true)
  return second and {
    h = string.sub(member, 1, first - 1),
    user = string.sub(member, first + 1, second - 1),
    tags = string.sub(member, second + 1),
  }
end

-- Returns the record itself, not the one it was rotated to: only records belong into an index.
local function read_record(prefix, h)
  local session = read(prefix, h)
  return session and not session.to and session or nil
end

-- Returns how long a session has left, and a little more, ms.
local function life_of(limit, now)
  return math.max(0, math.ceil((limit - now) / 1000)) + SLACK_MS
end

-- Deletes many sessions with few calls, because a call costs more than its work. More than 1,000 fill Lua's stack.
local function drop_all(prefix, sessions)
  local records, listed = {}, {x = {}}
  for _, session in ipairs(sessions) do
    records[#records + 1] = prefix .. 's:' .. session.h
    table.insert(listed.x, member_of(session.h, session.user, session.tags))
    for _, index in ipairs(indexes_of(session)) do
      listed[index] = listed[index] or {}
      table.insert(listed[index], session.h)
    end
  end
  if #records > 0 then
    redis.call('UNLINK', unpack(records))
    for index, members in pairs(listed) do
      asked_of('ZREM', prefix .. index, unpack(members))
    end
  end
end

local function drop(prefix, session)
  drop_all(prefix, {session})
end

-- A key that is no set was written by a stranger. It is deleted: it must not keep users from logging in.
local function put(key, score, member)
  if not asked_of('ZADD', key, plain(score), member) then
    redis.call('UNLINK', key)
    redis.call('ZADD', key, plain(score), member)
  end
end

-- Puts a session into its indexes, and into x: when to look at it again. Each has an end, also where it was lost and
-- begins anew here. `former`: the name it had there; it goes second, as a set that is empty for a moment loses its end.
local function index_session(prefix, session, life, former)
  put(prefix .. 'x', session.deadline, member_of(session.h, session.user, session.tags))
  keep_for(prefix .. 'x', life)
  if former then
    redis.call('ZREM', prefix .. 'x', member_of(former, session.user, session.tags))
  end
  for _, index in ipairs(indexes_of(session)) do
    put(prefix .. index, session.stamp, session.h)
    keep_for(prefix .. index, life)
    if former then
      redis.call('ZREM', prefix .. index, former)
    end
  end
end

-- The names of one session under other peppers lead to it: processes that have only these find it too.
local function write_aliases(aliases, session, now)
  for _, key in ipairs(aliases) do
    redis.call('HSET', key, '_to', session.h, '_until', FOREVER, '_u', session.user, '_alias', '1')
    redis.call('PEXPIRE', key, plain(life_of(session.limit, now)))
  end
end

-- The end of a name whose grace was over ends nothing: its holder was given another one. Where nobody was, because the
-- reply to the rotation is lost, that is undone (session_undo), and then this end counts. A full server goes without.
local function note_end(prefix, h)
  if h then
    redis.pcall('HSET', prefix .. 's:' .. h, '_ended', '1')
  end
end

local function late_key(prefix, key)
  return prefix .. 'late:' .. string.sub(key, #prefix + 3)
end

-- The response to this request brings another cookie, or none. Others under the old name may be under way, and arrive
-- later: they must neither set a cookie over it nor begin a session. A server that is full goes without.
local function mark_late(prefix, key, session)
  redis.pcall('SET', late_key(prefix, key), '', 'PX', LATE_MS)
  if session and session.key and session.key ~= key then -- it was rotated within the grace
    redis.pcall('SET', late_key(prefix, session.key), '', 'PX', LATE_MS)
  end
end

-- A session was begun where this name opened nothing. Others under it may begin theirs; they must not take away the
-- cookie.
local function mark_begun(prefix, key)
  redis.pcall('SET', late_key(prefix, key), BEGUN, 'PX', LATE_MS)
end

-- Returns whether a session must not be begun under any of these names. A mark that lasts for longer than it was made
-- for is from before the clock stepped back, and over.
local function is_late(prefix, keys)
  for _, key in ipairs(keys) do
    local late = late_key(prefix, key)
    local mark = redis.call('GET', late)
    if mark and mark ~= BEGUN and redis.call('PTTL', late) <= LATE_MS then
      return true
    end
  end
  return false
end

local function tell(ended, session)
  ended[#ended + 1] = session.h
  ended[#ended + 1] = session.user
end

-- Looks at the sessions that are due, oldest first: drops the dead, puts off the living.
-- Adds h, user of the dead to `ended`; returns how many were due, how long the oldest had been, µs
local function sweep(prefix, now, most, ended)
  local due = redis.call('ZRANGEBYSCORE', prefix .. 'x', '-inf', plain(now), 'WITHSCORES', 'LIMIT', 0, most)
  local dead = {}
  for i = 1, #due, 2 do
    local session = read_member(due[i])
    local record = session and read_record(prefix, session.h)
    if not session then
      redis.call('ZREM', prefix .. 'x', due[i])
    elseif record and now < record.deadline then
      redis.call('ZADD', prefix .. 'x', plain(record.deadline), due[i])
    else
      dead[#dead + 1] = session
      tell(ended, session)
    end
  end
  drop_all(prefix, dead)
  return #due / 2, due[2] and now - tonumber(due[2]) or 0
end
