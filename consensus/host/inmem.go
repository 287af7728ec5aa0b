package host

import (
	_ "unsafe" // for go:linkname

	_ "github.com/lni/dragonboat/v4" // whose settings are these
)

// Its settings can be changed by a file in the working directory alone, so these are
// changed where it keeps them.

// The library keeps the newest entries of a group in a slice, which it makes anew, and
// clears, whenever all of them are applied: under a light load for every single write.
// By default it has room for 512 entries, 57 KiB, which was up to half of all that was
// allocated.

//go:linkname entrySliceSize github.com/lni/dragonboat/v4/internal/raft.entrySliceSize
var entrySliceSize uint64

// minEntrySliceSize is the room from where on the slice is made anew; it has to be less.
//
//go:linkname minEntrySliceSize github.com/lni/dragonboat/v4/internal/raft.minEntrySliceSize
var minEntrySliceSize uint64

// It makes queues for 2048 proposals and 4096 reads that nobody has looked at, twice for
// each group: with three 1.4 MB, which each collection looks through. Here the requests
// that are made at the same time share one (gather, reads), and one that meets a full queue
// is tried again.

//go:linkname incomingProposals github.com/lni/dragonboat/v4.incomingProposalsMaxLen
var incomingProposals uint64

//go:linkname incomingReads github.com/lni/dragonboat/v4.incomingReadIndexMaxLen
var incomingReads uint64

func init() {
	entrySliceSize, minEntrySliceSize = 96, 24
	incomingProposals, incomingReads = 512, 256
}
