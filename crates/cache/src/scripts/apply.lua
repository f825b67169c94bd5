-- APPLY: a committed change of one key, with the new value.
-- KEYS: value, guard, marks. ARGV: new value, its version, time to live in ms.
-- Returns 1 if the value was replaced, 0 if the cached one is as new or newer, -1 if it acted as a delete.
--
-- A Redis that is full refuses the new value but still deletes, and absence is always right.

-- Versions exceed what a Lua number holds exactly; without sign or leading zero, longer is larger.
local function older(one, other)
    if #one ~= #other then return #one < #other end
    return one < other
end

local function cached_version()
    -- A mark: some transaction is about to commit, so no value may appear.
    if redis.call('EXISTS', KEYS[3]) == 1 then return nil end
    -- The version of a value that is gone says nothing.
    if redis.call('EXISTS', KEYS[1]) == 0 then return nil end
    local guard = redis.pcall('GET', KEYS[2])
    return type(guard) == 'string' and string.match(guard, '^V(%d+)$') or nil
end

local function stored(name, text)
    return not redis.pcall('SET', name, text, 'PX', ARGV[3]).err
end

local version = cached_version()
if version and not older(version, ARGV[2]) then return 0 end
if version and stored(KEYS[1], ARGV[1]) and stored(KEYS[2], 'V' .. ARGV[2]) then return 1 end
redis.call('UNLINK', KEYS[2], KEYS[1])
return -1
