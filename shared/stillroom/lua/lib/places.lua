-- A key has two places: `e:<key>`, and beside it `e:<key>%other`, for the values of a second release of the app whose
-- types differ. Each entry says in its codec whose it is, `j:<fingerprint>`; `j` alone is everybody's.

-- → the fingerprint of the entry there, '' for everybody's; nil where there is none that lives in this epoch.
local function release_at(key, epoch)
  local text = redis.pcall('GETRANGE', key, 0, 127)
  local its_epoch, release = string.match(
    type(text) == 'string' and text or '', '^1\t(%w+)\t%d+\t%d+\t%d+\t%a:?(%x*)\t')
  return its_epoch == epoch and release or nil
end

-- → the place for a loaded value of this release: where its own is or nobody's, else that which ends first. Its own is
-- nowhere else afterwards.
local function place_of(first, second, release, epoch)
  local there = release_at(first, epoch)
  if release == '' or not there or there == '' or there == release then
    if release ~= '' and release_at(second, epoch) == release then
      redis.call('UNLINK', second)
    end
    return first
  end
  local other = release_at(second, epoch)
  if not other or other == release or redis.call('PTTL', second) <= redis.call('PTTL', first) then
    return second
  end
  return first
end
