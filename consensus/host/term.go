package host

import (
	"context"
	"errors"

	"skein.io/skein/consensus/mvcc"
)

var (
	// ErrFenced is returned for requests and commands that act for a leader of the
	// cluster that has been replaced.
	ErrFenced = mvcc.ErrFenced
	// ErrNoReplica is returned when this node holds no replica of the shard.
	ErrNoReplica = errors.New("host: no replica of the shard on this node")
	// ErrUnknownShard is returned for a name that is not in the shard table.
	ErrUnknownShard = errors.New("host: unknown shard")
	// ErrClosed is returned by a host that has been closed.
	ErrClosed = errors.New("host: closed")
)

type termKey struct{}

// WithTerm makes every write under ctx act for the cluster's leader of that
// term: once the shard has applied the fence of a later term, it is refused with
// ErrFenced.
func WithTerm(ctx context.Context, term uint64) context.Context {
	return context.WithValue(ctx, termKey{}, term)
}

// Term returns the term of WithTerm, 0 if ctx has none.
func Term(ctx context.Context) uint64 {
	t, _ := ctx.Value(termKey{}).(uint64)
	return t
}
