// Package loan lets who asks a store of this process for a range of keys lend it the memory that the answer is put into, and take it back: the
// values of a page of 500 keys are a thousand pieces of garbage otherwise. It knows nothing of stores.
//
// The borrower of a Loan puts it into the context of its requests with With, and calls Return when it needs nothing of the answers any more,
// neither keys nor values. A store may use it or not (one in another process does not): answers are the same. A Loan is used by one goroutine at a time.
package loan

import (
	"context"
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"
)

// keptBytes is how much a slab may have grown to be lent again. A page of 500 pods has some 600 KB.
const keptBytes = 2 << 20

// Slab is the memory of one answer.
type Slab struct {
	KVs   []mvccpb.KeyValue
	Refs  []*mvccpb.KeyValue
	Found [][]byte
	Bytes []byte
}

var slabs = sync.Pool{New: func() any { return &Slab{} }}

// Loan is what one borrower has. The zero value works.
type Loan struct{ lent []*Slab }

// Slab lends memory for one more answer. All its slices are empty.
func (l *Loan) Slab() *Slab {
	s := slabs.Get().(*Slab)
	l.lent = append(l.lent, s)
	return s
}

// Return gives all of it back.
func (l *Loan) Return() {
	for i, s := range l.lent {
		l.lent[i] = nil
		if cap(s.Bytes) > keptBytes {
			continue
		}
		clear(s.KVs)
		clear(s.Found)
		s.KVs, s.Refs, s.Found, s.Bytes = s.KVs[:0], s.Refs[:0], s.Found[:0], s.Bytes[:0]
		slabs.Put(s)
	}
	l.lent = l.lent[:0]
}

type key struct{}

// With lends l to the answers of requests under the context.
func With(ctx context.Context, l *Loan) context.Context { return context.WithValue(ctx, key{}, l) }

// From gives what is lent to requests under a context; nil: nothing.
func From(ctx context.Context) *Loan {
	l, _ := ctx.Value(key{}).(*Loan)
	return l
}
