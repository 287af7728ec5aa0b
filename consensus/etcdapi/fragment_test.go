package etcdapi

import (
	"fmt"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

func TestSendFragments(t *testing.T) {
	for _, limit := range []int{1, 60, 100, 250, 1 << 20} {
		for n := range 12 {
			resp := &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: 9}, WatchId: 3}
			for i := range n {
				resp.Events = append(resp.Events, &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: fmt.Append(nil, i), Value: make([]byte, i*7)}})
			}
			var got []*mvccpb.Event
			sent, open := 0, true
			err := sendFragments(resp, limit, func(r *pb.WatchResponse) error {
				if !open {
					t.Fatal("a response after the last")
				}
				if r.WatchId != 3 || r.Header.Revision != 9 {
					t.Fatalf("%+v", r)
				}
				if len(r.Events) > 1 && r.Size() > limit {
					t.Errorf("limit %d: %d events in %d bytes", limit, len(r.Events), r.Size())
				}
				open = r.Fragment
				got = append(got, r.Events...)
				sent++
				return nil
			})
			if err != nil || open || len(got) != n || sent == 0 {
				t.Fatalf("limit %d: %d events in %d responses, open=%v: %v", limit, len(got), sent, open, err)
			}
			for i, e := range got {
				if string(e.Kv.Key) != fmt.Sprint(i) {
					t.Fatalf("event %d is %s", i, e.Kv.Key)
				}
			}
		}
	}
}
