-- ACQUIRE: what a reader that found no usable value may do.
-- KEYS: value, guard, marks. ARGV: token, lease in ms, '1' if the value present is known to be unusable.
-- Returns {'BYPASS'}, {'VALUE', value}, {'WAIT'} or {'GRANT', lease}.

-- A transaction is about to commit a change: what is loaded now may be old in a moment.
if redis.call('EXISTS', KEYS[3]) == 1 then return {'BYPASS'} end

if ARGV[3] ~= '1' then
    -- A value of another type is an error here and counts as none.
    local value = redis.pcall('GET', KEYS[1])
    if type(value) == 'string' then return {'VALUE', value} end
end

local guard = redis.pcall('GET', KEYS[2])
if type(guard) == 'string' then
    -- The own lease, still alive, is named again: the first answer may have been lost on the way.
    local own = 'L' .. ARGV[1] .. ':'
    if string.sub(guard, 1, #own) == own then return {'GRANT', string.sub(guard, 2)} end
    if string.sub(guard, 1, 1) == 'L' then return {'WAIT'} end
end

-- The token alone must not name the lease: a copy of this request, delayed on the way, may arrive when the lease is gone
-- and its holder has loaded what is now old. With the time it creates another lease, which nobody holds.
local time = redis.call('TIME')
local lease = ARGV[1] .. ':' .. time[1] .. '.' .. time[2]
redis.call('SET', KEYS[2], 'L' .. lease, 'PX', ARGV[2])
return {'GRANT', lease}
