package host

import _ "unsafe" // for go:linkname

// The library keeps the newest entries of a group in a slice, which it makes anew, and
// clears, whenever all of them are applied: under a light load for every single write.
// By default it has room for 512 entries, 57 KiB, which was up to half of all that was
// allocated. Its settings can be changed by a file in the working directory alone.

//go:linkname entrySliceSize github.com/lni/dragonboat/v4/internal/raft.entrySliceSize
var entrySliceSize uint64

// minEntrySliceSize is the room from where on the slice is made anew; it has to be less.
//
//go:linkname minEntrySliceSize github.com/lni/dragonboat/v4/internal/raft.minEntrySliceSize
var minEntrySliceSize uint64

func init() { entrySliceSize, minEntrySliceSize = 96, 24 }
