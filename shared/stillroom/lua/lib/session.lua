-- Reads and changes sessions. All keys of a shard begin with one prefix and live in one slot: each act is one script.
--   s:<h>     the record: _u user ('' anonymous), _c created, _l last seen, _x absolute deadline, _i idle, _s stamp,
--             _v version, _t tags, one a line, _m meta, _b bytes of data; and the data, one JSON a key. Times: µs.
--             _a when the user last proved his identity, where that is not _c (0: never)
--             Or, where a session was rotated: _to its new name, _until the end of grace, _grace how long that is, _u
--             user.
--             _ended: somebody has asked for its end since its grace was over. That counts if its rotation is undone
--             The same with _alias, for ever: the name under another pepper, while peppers are changed.
--             Or _never: its creation or rotation was undone, and must not happen later.
--             A session that waits for another's creation to be accepted has _held: its _x, which is 0 meanwhile
--   u:<user>  g:<tag>   names → stamp
--   d:<user>  the names of the user's devices → when each logged in last, µs
--   x         <h>\n<user>\n<tags> → when to look at it again, µs: enough to clean up after a record that is gone
--   rev       u:<user>, g:<tag> revoked and not yet deleted → stamp: sessions made up to it are dead
--             !left, !arriving: the shard is shut, because it is being moved to another server, or from one
--   all       a stamp: sessions of any user made up to it are dead
--   x:<stamp> the x of the moment when `all` was set: its sessions are still to be deleted
--   clock     the newest stamp
--   late:<h>  the browser is getting another cookie, or none, in the place of this name's; `begun`: the name
--             opened nothing
-- A stamp is max(TIME in µs, newest + 1): it orders creations and revocations also where the clock steps back.

local SLACK_MS = 60000 -- a record outlives its session by this: the script decides, not the key's TTL
local HOPS = 8 -- rotations within one grace that an old name still finds its way through
local HOPS_TO_END = 1000 -- and rotations since that an end follows: each is one read of some µs

-- Read once a script, because each command costs as much as all the work with its reply. ARGV[1] is the prefix.
local has_revocations = redis.call('EXISTS', ARGV[1] .. 'rev', ARGV[1] .. 'all') > 0
local all_up_to

if has_revocations then
  local shut = redis.pcall('ZMSCORE', ARGV[1] .. 'rev', '!left', '!arriving')
  if not shut.err and (shut[1] or shut[2]) then
    local where = shut[1] and 'have moved to another server' or 'are still on their way to this server'
    return redis.error_reply('TRYAGAIN the sessions of this shard ' .. where)
  end
end

local function each_line(text)
  return string.gmatch(text, '[^\n]+')
end

local PARTS = {'_u', '_s', '_l', '_x', '_i', '_t', '_to', '_until', '_grace'}

-- Returns nil for what is no whole number that Lua holds exactly: a stranger wrote it. `nan` is less than nothing, too.
local MOST = 9007199254740992

local function number(text)
  local found = text and tonumber(text)
  return found and found > -MOST and found < MOST and found or nil
end

-- Returns a record from its fields, in the order of PARTS; nil for a key that is no record: another type, or cut short.
-- A damaged key harms no other session. A record that is already on another node of a cluster is not gone: whoever
-- took it for gone would leave a session that was to end, and forget where it is.
local function parsed(h, key, f)
  if f.err then
    if not string.find(f.err, 'WRONGTYPE', 1, true) then
      error(f.err)
    end
    return nil
  end
  if f[7] then
    return {h = h, to = f[7], grace_until = number(f[8]) or 0, grace = number(f[9]), user = f[1] or ''}
  end
  local stamp, seen, limit, idle = number(f[2]), number(f[3]), number(f[4]), number(f[5])
  if not (stamp and seen and limit and idle and f[1] and f[6]) then
    return nil
  end
  return {
    h = h, key = key, user = f[1], tags = f[6], stamp = stamp, seen = seen, limit = limit, idle = idle,
    deadline = math.min(seen + idle, limit),
  }
end

local function read(prefix, h)
  local key = prefix .. 's:' .. h
  return parsed(h, key, redis.pcall('HMGET', key, unpack(PARTS)))
end

-- Returns the indexes besides x. Anonymous sessions (user '') have none by user: nobody lists or revokes them by it.
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
  if not has_revocations then
    return false
  end
  all_up_to = all_up_to or number(redis.call('GET', prefix .. 'all') or '0') or 0
  if session.stamp <= all_up_to then
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

-- Returns whether the grace of an old name was over when the caller asked. `now`: the caller wants to use the session;
-- then a grace with more than twice its length to go is over too: the clock has stepped back since. An end goes on.
local function is_over(old, asked, now)
  return asked >= old.grace_until or (now and old.grace and old.grace_until - now > 2 * old.grace)
end

-- Follows an old name through each rotation whose grace was not over when the caller asked.
local function follow(prefix, session, asked, hops, now)
  for _ = 1, hops do
    if not (session and session.to) or is_over(session, asked, now) then
      break
    end
    session = read(prefix, session.to)
  end
  return session
end

-- Returns the living session under one of these keys; or nil, the reason, the session to drop if it is dead, how
-- long before the call the grace of its old name was over, µs, and that name. `asked`: since when the session is to
-- end, if it is.
local function find(prefix, now, keys, asked, hops)
  local uses = not asked and now
  asked = asked or now
  for _, key in ipairs(keys) do
    local session = follow(prefix, read(prefix, string.sub(key, #prefix + 3)), asked, hops or HOPS, uses)
    if session and session.to then
      if is_over(session, asked, uses) then
        local heir = follow(prefix, session, 0, HOPS)
        local late = asked - session.grace_until
        return nil, {'replayed', heir and heir.h or session.to, session.user}, nil, late, session.h
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

-- A server that evicts (volatile-lru) takes first what nobody has asked for. The indexes by which all sessions of a user
-- or a tag are ended must not go before the sessions: they are asked for as the session is, and one that is gone begins
-- anew. The other sessions in it come back as they are used.
local function ask_for_indexes(session, now)
  local life = math.ceil((session.limit - now) / 1000) + SLACK_MS
  for _, name in ipairs(indexes_of(session)) do
    local index = ARGV[1] .. name
    if not redis.pcall('ZSCORE', index, session.h) then
      redis.call('ZADD', index, plain(session.stamp), session.h)
      if redis.call('PTTL', index) < life then
        redis.call('PEXPIRE', index, plain(life))
      end
    end
  end
end

-- A clock that has stepped back a little keeps the order in which sessions were seen. After a larger step it is seen now,
-- and has as long to live as it had, or both its times would be longer by the step.
-- PEXPIRE first: a server that is full refuses a script's first write if it takes memory, and only the first. One that
-- can't write its file, or wants more replicas than it has, refuses all writes (MISCONF, NOREPLICAS) and answers all
-- reads: the session is read, and is not seen.
-- Returns whether that was written down.
local function see(session, now)
  local back = session.seen - now
  if back > session.idle / 20 then
    if session.seen <= session.limit then -- else it is no time of ours
      session.limit = session.limit - back
    end
    session.seen = now
  else
    session.seen = math.max(now, session.seen)
  end
  session.deadline = math.min(session.seen + session.idle, session.limit)
  local life = plain(math.ceil((session.deadline - now) / 1000) + SLACK_MS)
  local refused = redis.pcall('PEXPIRE', session.key, life)
  if type(refused) == 'table' then
    if string.find(refused.err, 'MISCONF', 1, true) or string.find(refused.err, 'NOREPLICAS', 1, true) then
      return false
    end
    redis.call('PEXPIRE', session.key, life) -- raises the error as the server words it
  end
  redis.call('HSET', session.key, '_l', plain(session.seen), '_x', plain(session.limit))
  ask_for_indexes(session, now)
  return true
end

-- Writes down that the session was seen. Returns µs since that was last written down: 0 if it is now, and less where the
-- clock has stepped back since.
local function touch(session, now, interval)
  local unseen, most = now - session.seen, session.idle / 20
  if unseen < math.min(interval, most) and -unseen <= most then
    return unseen
  end
  return see(session, now) and 0 or unseen
end

-- Returns a record's own fields, joined by tabs, and its data as one JSON object. Nothing is decoded: the fields hold
-- no tab, and each value is JSON already. Two strings are read faster than thirty.
local OWN = {'_u', '_c', '_l', '_x', '_i', '_v', '_a', '_t', '_m'}

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
