-- Sessions. All keys of a shard begin with one prefix and live in one slot, so each act is one script.
--   s:<h>     the record: _u user ('' anonymous), _c created, _l last seen, _x absolute deadline, _i idle, _s stamp,
--             _v version, _t tags, one a line, _m meta, _b bytes of data; and the data, one JSON a key. Times: µs.
--             _a when the user last proved who he is, where that is not _c (0: never)
--             Or, where a session was rotated: _to its new name, _until the end of grace, _u user
--   u:<user>  g:<tag>   names → stamp
--   d:<user>  what the user's devices are called → when each logged in last, µs
--   x         <h>\n<user>\n<tags> → when to look at it again, µs: enough to clean up after a record that is gone
--   rev       u:<user>, g:<tag> revoked and not yet deleted → stamp: what was made up to it is dead
--   all       a stamp: what was made up to it is dead, whose ever it is
--   x:<stamp> what x was when that was said: those sessions are still to be deleted
--   clock     the newest stamp
-- And <ns>:late{s<shard>}:<h>: the browser is getting another cookie, or none, in the place of this name's.
-- A stamp is max(TIME in µs, newest + 1): it orders creations and revocations also where the clock steps back.

local SLACK_MS = 60000 -- a record outlives its session by this: the script decides, not the key's TTL
local LATE_MS = 60000 -- a response that began before a login may still be under way
local HOPS = 8 -- rotations within one grace that an old name still finds its way through

local function keep_for(key, ms)
  if redis.call('PTTL', key) < ms then
    redis.call('PEXPIRE', key, plain(ms))
  end
end

-- `life`: what it orders is gone after so many ms.
local function next_stamp(prefix, now, life)
  local newest = tonumber(redis.call('GET', prefix .. 'clock') or '0')
  local stamp = plain(math.max(now, newest + 1))
  redis.call('SET', prefix .. 'clock', stamp, 'KEEPTTL')
  keep_for(prefix .. 'clock', life)
  return stamp
end

local function each_line(text)
  return string.gmatch(text, '[^\n]+')
end

local function member_of(h, user, tags)
  return h .. '\n' .. user .. '\n' .. tags
end

local function read_member(member)
  local first = string.find(member, '\n', 1, true)
  local second = string.find(member, '\n', first + 1, true)
  return {
    h = string.sub(member, 1, first - 1),
    user = string.sub(member, first + 1, second - 1),
    tags = string.sub(member, second + 1),
  }
end

local function read(prefix, h)
  local key = prefix .. 's:' .. h
  local f = redis.call('HMGET', key, '_u', '_s', '_l', '_x', '_i', '_t', '_to', '_until')
  if f[7] then
    return {h = h, to = f[7], grace_until = tonumber(f[8]), user = f[1]}
  end
  if not f[2] then
    return nil
  end
  local session = {
    h = h, key = key, user = f[1], tags = f[6],
    stamp = tonumber(f[2]), seen = tonumber(f[3]), limit = tonumber(f[4]), idle = tonumber(f[5]),
  }
  session.deadline = math.min(session.seen + session.idle, session.limit)
  return session
end

-- Beside x: nobody lists, or revokes, the sessions of the anonymous, whose user is ''.
local function indexes_of(session)
  local names = {}
  if session.user ~= '' then
    names[1] = 'u:' .. session.user
  end
  for tag in each_line(session.tags) do
    names[#names + 1] = 'g:' .. tag
  end
  return names
end

local function is_revoked(prefix, session)
  if redis.call('EXISTS', prefix .. 'rev', prefix .. 'all') == 0 then
    return false
  end
  if session.stamp <= tonumber(redis.call('GET', prefix .. 'all') or '0') then
    return true
  end
  local names = indexes_of(session)
  for _, stamp in ipairs(names[1] and redis.call('ZMSCORE', prefix .. 'rev', unpack(names)) or {}) do
    if stamp and tonumber(stamp) >= session.stamp then
      return true
    end
  end
  return false
end

local function lives(prefix, session, now)
  return now < session.deadline and not is_revoked(prefix, session)
end

-- Where an old name leads, as far as its graces go that were not over when it was asked for.
local function follow(prefix, session, asked)
  for _ = 1, HOPS do
    if not (session and session.to) or asked >= session.grace_until then
      break
    end
    session = read(prefix, session.to)
  end
  return session
end

-- The living session under one of these keys, or nil and why not. `asked`: when, if it was not now.
local function find(prefix, now, keys, asked)
  asked = asked or now
  for _, key in ipairs(keys) do
    local session = follow(prefix, read(prefix, string.sub(key, #prefix + 3)), asked)
    if session and session.to then
      if asked >= session.grace_until then
        local heir = follow(prefix, session, 0)
        return nil, {'replayed', heir and heir.h or session.to, session.user}
      end
    elseif session then
      if now >= session.deadline then
        return nil, {'expired'}, session -- to be dropped: the clock may step back
      end
      if is_revoked(prefix, session) then
        return nil, {'revoked'}
      end
      return session
    end
  end
  return nil, {'missing'}
end

-- PEXPIRE first: a server that is full refuses a script's first write if it takes memory, and only the first.
local function see(session, now)
  session.seen = math.max(now, session.seen)
  session.deadline = math.min(session.seen + session.idle, session.limit)
  redis.call('PEXPIRE', session.key, plain(math.ceil((session.deadline - now) / 1000) + SLACK_MS))
  redis.call('HSET', session.key, '_l', plain(session.seen))
end

-- → µs since it was written down that it was seen: 0 if that is now
local function touch(session, now, interval)
  local unseen = now - session.seen
  if unseen < math.min(interval, session.idle / 20) then
    return math.max(0, unseen)
  end
  see(session, now)
  return 0
end

local function late_key(prefix, key)
  local tag = string.find(prefix, '{', 1, true)
  return string.sub(prefix, 1, tag - 1) .. 'late' .. string.sub(prefix, tag) .. string.sub(key, #prefix + 3)
end

-- The response to this request brings another cookie, or none. Others under the old name may be under way, and arrive
-- later: they must neither set a cookie over it nor begin a session. A server that is full goes without.
local function mark_late(prefix, key, session)
  redis.pcall('SET', late_key(prefix, key), '', 'PX', LATE_MS)
  if session and session.key and session.key ~= key then -- it was rotated within the grace
    redis.pcall('SET', late_key(prefix, session.key), '', 'PX', LATE_MS)
  end
end

local function is_late(prefix, keys)
  for _, key in ipairs(keys) do
    if redis.call('EXISTS', late_key(prefix, key)) == 1 then
      return true
    end
  end
  return false
end

-- Each call costs more than what it does, so many sessions go with few: at most 1,000, or Lua's stack is full.
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
      redis.call('ZREM', prefix .. index, unpack(members))
    end
  end
end

local function drop(prefix, session)
  drop_all(prefix, {session})
end

-- What a record says of itself, tab between tab, and its data put together to one JSON object. Nothing is decoded:
-- the parts hold no tab, and each value is JSON already. Two strings are read faster than thirty.
local OWN = {'_u', '_c', '_l', '_x', '_i', '_v', '_t', '_m', '_a'}

local function own_of(key)
  local own = redis.call('HMGET', key, unpack(OWN))
  for i = 1, #OWN do
    own[i] = own[i] or ''
  end
  return table.concat(own, '\t')
end

local function answer(h, key)
  local all, own, data = redis.call('HGETALL', key), {}, {}
  for i = 1, #all, 2 do
    if string.byte(all[i]) == 95 then -- _
      own[all[i]] = all[i + 1]
    else
      data[#data + 1] = '"' .. all[i] .. '":' .. all[i + 1]
    end
  end
  local head = {}
  for i, field in ipairs(OWN) do
    head[i] = own[field] or ''
  end
  return {'ok', h, table.concat(head, '\t'), '{' .. table.concat(data, ',') .. '}'}
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
    local record = read(prefix, session.h)
    if record and not record.to and now < record.deadline then
      redis.call('ZADD', prefix .. 'x', plain(record.deadline), due[i])
    else
      dead[#dead + 1] = session
      tell(ended, session)
    end
  end
  drop_all(prefix, dead)
  return #due / 2, due[2] and now - tonumber(due[2]) or 0
end
