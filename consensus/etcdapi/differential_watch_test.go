package etcdapi_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/metadata"
)

// told is what a stream of watches said, in order: events one by one, as how many
// of them share a message depends on the moment.
type told struct {
	out []string
	// fragments and messages that carry events.
	fragments, messages int
	barrier             bool // has come
}

func (w *told) add(r *pb.WatchResponse) {
	head := fmt.Sprintf("watch %d", r.WatchId)
	if r.Created {
		w.out = append(w.out, fmt.Sprintf("%s created rev %d", head, r.Header.Revision))
	}
	if len(r.Events) > 0 {
		w.messages++
	}
	if r.Fragment {
		w.fragments++
	}
	for _, e := range r.Events {
		if string(e.Kv.Key) == barrier {
			w.barrier = w.barrier || r.WatchId == barrierID
			continue
		}
		w.out = append(w.out, fmt.Sprintf("%s %s", head, clip(e.String())))
	}
	if r.Canceled {
		w.out = append(w.out, fmt.Sprintf("%s cancelled compact %d reason %q", head, r.CompactRevision, r.CancelReason))
	}
	if len(r.Events) == 0 && !r.Created && !r.Canceled {
		p := fmt.Sprintf("%s progress rev %d", head, r.Header.Revision)
		if len(w.out) == 0 || w.out[len(w.out)-1] != p { // more of them if the machine is slow
			w.out = append(w.out, p)
		}
	}
}

// Every stream has a watch besides, of a key that is written last.
const (
	barrierID = 99
	barrier   = "barrier"
)

func clip(s string) string {
	if len(s) > 200 {
		return fmt.Sprint(s[:200], " and ", len(s)-200)
	}
	return s
}

// watchScript opens a stream, sends requests and reads until the answer to each has
// come; do, if not nil, changes something before the last reads.
type watchScript struct {
	name string
	md   metadata.MD
	send []*pb.WatchRequest
	// answers is how many creations, cancellations and notifications to wait for.
	answers int
	do      func(context.Context, *peer) error
	events  int
	// then is sent after do.
	then []*pb.WatchRequest
	// unordered: the answers of several watches, or of the two directions, may cross.
	unordered bool
}

func (d *differ) stream(s watchScript) {
	d.t.Helper()
	same(d, s.name, func(ctx context.Context, p *peer) ([]string, error) {
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		if s.md != nil {
			ctx = metadata.NewOutgoingContext(ctx, s.md)
		}
		st, err := p.watch.Watch(ctx)
		if err != nil {
			return nil, err
		}
		var w told
		answers, events := 0, 0
		read := func(until func() bool) error {
			for !until() {
				r, err := st.Recv()
				if err != nil {
					return fmt.Errorf("after %q: %w", w.out, err)
				}
				w.add(r)
				if events += len(r.Events); len(r.Events) == 0 {
					answers++
				}
			}
			return nil
		}
		s := s
		s.send = append([]*pb.WatchRequest{create(pb.WatchCreateRequest{Key: []byte(barrier), WatchId: barrierID})}, s.send...)
		s.answers++
		for _, q := range s.send {
			if err := st.Send(q); err != nil {
				return nil, err
			}
		}
		if err := read(func() bool { return answers >= min(len(s.send), s.answers) }); err != nil {
			return nil, err
		}
		if s.do != nil {
			if err := s.do(ctx, p); err != nil {
				return nil, err
			}
		}
		for _, q := range s.then {
			if err := st.Send(q); err != nil {
				return nil, err
			}
		}
		if err := read(func() bool { return answers >= s.answers && events >= s.events }); err != nil {
			return nil, err
		}
		// Nothing else has come: what is watched besides comes after it. The client has
		// closed its direction before, which does not end the stream.
		if err := st.CloseSend(); err != nil {
			return nil, err
		}
		if _, err := p.kv.Put(ctx, &pb.PutRequest{Key: []byte(barrier)}); err != nil {
			return nil, err
		}
		if err := read(func() bool { return w.barrier }); err != nil {
			return nil, err
		}
		if s.unordered {
			slices.Sort(w.out)
		}
		return w.out, nil
	})
}

func create(q pb.WatchCreateRequest) *pb.WatchRequest {
	return &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &q}}
}

func cancelWatch(id int64) *pb.WatchRequest {
	return &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: id}}}
}

var progressRequest = &pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}}

func TestLikeEtcdWatch(t *testing.T) {
	d := newDiffer(t)
	for i := range 12 {
		d.put("put", &pb.PutRequest{Key: fmt.Append(nil, "k", i%4), Value: fmt.Append(nil, "v", i)})
	}
	d.del("delete", &pb.DeleteRangeRequest{Key: []byte("k1")})
	d.compact("compact", &pb.CompactionRequest{Revision: 5})
	some := func(ctx context.Context, p *peer) error {
		for _, k := range []string{"k1", "k2", "z"} {
			if _, err := p.kv.Put(ctx, &pb.PutRequest{Key: []byte(k), Value: []byte("new")}); err != nil {
				return err
			}
		}
		_, err := p.kv.Txn(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{opDelete("k1", ""), opPut("k2", "txn"), opPut("k0", "txn")}})
		return err
	}
	k, end := []byte("k"), []byte("l")
	for _, s := range []watchScript{
		{name: "one key", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: []byte("k1")})}, answers: 1, do: some, events: 2},
		{name: "a range with what was there", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: k, RangeEnd: end, PrevKv: true})}, answers: 1, do: some, events: 5},
		{name: "no puts", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: k, RangeEnd: end, Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT}})}, answers: 1, do: some, events: 1},
		{name: "no deletes", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: k, RangeEnd: end, Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NODELETE}})}, answers: 1, do: some, events: 4},
		{name: "nothing at all", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: k, RangeEnd: end, Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NODELETE, pb.WatchCreateRequest_NOPUT, 9}})}, answers: 1, do: some},
		{name: "from a revision", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: k, RangeEnd: end, StartRevision: 7, PrevKv: true})}, answers: 1, do: some, events: 13},
		{name: "from the compacted revision", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: k, RangeEnd: end, StartRevision: 5, PrevKv: true})}, answers: 1, events: 14},
		{name: "from before the compaction", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: k, RangeEnd: end, StartRevision: 3})}, answers: 2},
		{name: "from the first revision", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: k, RangeEnd: end, StartRevision: 1})}, answers: 2},
		{name: "from a negative revision", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: k, RangeEnd: end, StartRevision: -1})}, answers: 1},
		{name: "from the future", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: k, RangeEnd: end, StartRevision: 1 << 40})}, answers: 1, do: some},
		{name: "no key", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{RangeEnd: end})}, answers: 1, do: some, events: 5, unordered: true},
		{name: "no key and no end", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{})}, answers: 1, do: some},
		{name: "from a key on", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: []byte("k2"), RangeEnd: []byte{0}})}, answers: 1, do: some, events: 3},
		{name: "a backward range", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: []byte("z"), RangeEnd: []byte("a")})}, answers: 1, do: some},
		{name: "an own id", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: []byte("z"), WatchId: 7})}, answers: 1, do: some, events: 1},
		{name: "the same id twice", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: []byte("z"), WatchId: 7}), create(pb.WatchCreateRequest{Key: []byte("z"), WatchId: 7})}, answers: 2, do: some, events: 1},
		{name: "negative ids", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: []byte("z"), WatchId: -1}), create(pb.WatchCreateRequest{Key: []byte("z"), WatchId: -9})}, answers: 2, do: some, events: 2, unordered: true},
		{name: "ids that are chosen and given", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: []byte("z"), WatchId: 1}), create(pb.WatchCreateRequest{Key: []byte("z")}), create(pb.WatchCreateRequest{Key: []byte("z")})}, answers: 3, do: some, events: 3, unordered: true},
		{name: "cancel", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: []byte("z"), WatchId: 3}), cancelWatch(3)}, answers: 2, do: some},
		{name: "cancel what is not", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: []byte("z"), WatchId: 3}), cancelWatch(4), cancelWatch(-1), cancelWatch(3), cancelWatch(3)}, answers: 2},
		{name: "cancel and make anew", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: []byte("z"), WatchId: 3}), cancelWatch(3), create(pb.WatchCreateRequest{Key: []byte("z"), WatchId: 3})}, answers: 3, do: some, events: 1},
		{name: "progress on request", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: []byte("none")})}, answers: 2, then: []*pb.WatchRequest{progressRequest}},
		{name: "progress on request at once", send: []*pb.WatchRequest{progressRequest}, unordered: true},
		{name: "empty requests", send: []*pb.WatchRequest{{}, {RequestUnion: &pb.WatchRequest_CreateRequest{}}, {RequestUnion: &pb.WatchRequest_CancelRequest{}}, {RequestUnion: &pb.WatchRequest_ProgressRequest{}}}},
		{name: "progress by itself", send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: []byte("none"), ProgressNotify: true, WatchId: 5})}, answers: 2},
		{name: "with a leader", md: metadata.Pairs("hasleader", "true"), send: []*pb.WatchRequest{create(pb.WatchCreateRequest{Key: []byte("k1")})}, answers: 1, do: some, events: 2},
	} {
		d.stream(s)
	}

	// More than a message carries, in parts and whole.
	for i := range 5 {
		d.put("large", &pb.PutRequest{Key: fmt.Append(nil, "large/", i), Value: bytes.Repeat([]byte{byte('a' + i)}, 1<<20)})
	}
	r, err := d.etcd.kv.Range(d.ctx, &pb.RangeRequest{Key: []byte("a"), CountOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	from := r.Header.Revision - 4
	for _, fragment := range []bool{true, false} {
		same(d, fmt.Sprint("fragment ", fragment), func(ctx context.Context, p *peer) (*told, error) {
			ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
			defer cancel()
			st, err := p.watch.Watch(ctx)
			if err != nil {
				return nil, err
			}
			if err := st.Send(create(pb.WatchCreateRequest{Key: []byte("large/"), RangeEnd: []byte("large0"), StartRevision: from, Fragment: fragment})); err != nil {
				return nil, err
			}
			w := &told{}
			for n := 0; n < 5; {
				r, err := st.Recv()
				if err != nil {
					return nil, err
				}
				w.add(r)
				n += len(r.Events)
			}
			return w, nil
		})
	}
	d.end()
}
