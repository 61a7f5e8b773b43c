-- Bans. One is a string that says why, and its TTL is the ban: who checks a limit need only see that it is there.

local INDEX_MS = 31 * 86400000 -- no ban is longer

-- index: subject → until, so that bans can be listed. What has run out is dropped whenever one is added.
local function write_ban(key, index, subject, now, ms, about)
  redis.call('ZREMRANGEBYSCORE', index, '-inf', plain(now))
  about.since, about['until'] = now / 1000, (now + ms) / 1000
  redis.call('SET', key, cjson.encode(about), 'PX', plain(ms))
  redis.call('ZADD', index, plain(now + ms), subject)
  redis.call('PEXPIRE', index, plain(INDEX_MS))
end
