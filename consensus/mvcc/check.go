package mvcc

import (
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/pkg/v3/adt"
)

// MaxTxnOps is the largest number of operations in one branch of a transaction.
// etcd's default is 128; a restore or a bulk delete profits from more.
const MaxTxnOps = 2048

// The Check functions refuse what etcd's v3 API refuses, with its errors
// (rpctypes.ErrGRPC...). They run before a request is proposed and again when it
// is applied: the libraries below panic on some of what they catch.

// CheckRange checks a range request.
func CheckRange(r *pb.RangeRequest) error {
	if r == nil || len(r.Key) == 0 {
		return rpctypes.ErrGRPCEmptyKey
	}
	_, order := pb.RangeRequest_SortOrder_name[int32(r.SortOrder)]
	_, target := pb.RangeRequest_SortTarget_name[int32(r.SortTarget)]
	if !order || !target {
		return rpctypes.ErrGRPCInvalidSortOption
	}
	return nil
}

// CheckPut checks a put request.
func CheckPut(r *pb.PutRequest) error {
	switch {
	case r == nil || len(r.Key) == 0:
		return rpctypes.ErrGRPCEmptyKey
	case r.IgnoreValue && len(r.Value) != 0:
		return rpctypes.ErrGRPCValueProvided
	case r.IgnoreLease && r.Lease != 0:
		return rpctypes.ErrGRPCLeaseProvided
	}
	return nil
}

// CheckDelete checks a delete request.
func CheckDelete(r *pb.DeleteRangeRequest) error {
	if r == nil || len(r.Key) == 0 {
		return rpctypes.ErrGRPCEmptyKey
	}
	return nil
}

// CheckTxn checks a transaction with everything inside it, also that no key is
// written twice by one branch.
func CheckTxn(r *pb.TxnRequest) error {
	if err := CheckTxnOps(r, MaxTxnOps); err != nil {
		return err
	}
	for _, branch := range [][]*pb.RequestOp{r.Success, r.Failure} {
		if len(branch) == 0 || len(branch) == 1 && branch[0].GetRequestTxn() == nil {
			continue // nothing to be at odds with: nearly all transactions
		}
		if _, _, err := writes(branch); err != nil {
			return err
		}
	}
	return nil
}

// CheckTxnOps checks the operations of a transaction one by one, and that there are
// at most budget, those of the nested transactions along one path included.
func CheckTxnOps(r *pb.TxnRequest, budget int) error {
	if r == nil {
		return rpctypes.ErrGRPCKeyNotFound
	}
	n := max(len(r.Compare), len(r.Success), len(r.Failure))
	if n > budget {
		return rpctypes.ErrGRPCTooManyOps
	}
	for _, c := range r.Compare {
		if c == nil || len(c.Key) == 0 {
			return rpctypes.ErrGRPCEmptyKey
		}
	}
	for _, branch := range [][]*pb.RequestOp{r.Success, r.Failure} {
		for _, op := range branch {
			if err := checkOp(op, budget-n); err != nil {
				return err
			}
		}
	}
	return nil
}

func checkOp(op *pb.RequestOp, budget int) error {
	if op == nil {
		return rpctypes.ErrGRPCKeyNotFound
	}
	switch v := op.Request.(type) {
	case *pb.RequestOp_RequestRange:
		return CheckRange(v.RequestRange)
	case *pb.RequestOp_RequestPut:
		return CheckPut(v.RequestPut)
	case *pb.RequestOp_RequestDeleteRange:
		return CheckDelete(v.RequestDeleteRange)
	case *pb.RequestOp_RequestTxn:
		return CheckTxnOps(v.RequestTxn, budget)
	}
	return rpctypes.ErrGRPCKeyNotFound // an empty operation
}

func deleteInterval(r *pb.DeleteRangeRequest) adt.Interval {
	if len(r.RangeEnd) == 0 {
		return adt.NewStringAffinePoint(string(r.Key))
	}
	return adt.NewStringAffineInterval(string(r.Key), string(r.RangeEnd))
}

// writes collects the keys that ops may put and the ranges they may delete.
// Duplicates are an error, except between the two branches of one nested
// transaction, of which only one is executed.
func writes(ops []*pb.RequestOp) (map[string]bool, adt.IntervalTree, error) {
	puts, dels := map[string]bool{}, adt.NewIntervalTree()
	for _, op := range ops {
		if v, ok := op.Request.(*pb.RequestOp_RequestDeleteRange); ok {
			dels.Insert(deleteInterval(v.RequestDeleteRange), struct{}{})
		}
	}
	add := func(k string, allowed map[string]bool) error {
		if (puts[k] && !allowed[k]) || dels.Intersects(adt.NewStringAffinePoint(k)) {
			return rpctypes.ErrGRPCDuplicateKey
		}
		puts[k] = true
		return nil
	}
	for _, op := range ops {
		v, ok := op.Request.(*pb.RequestOp_RequestTxn)
		if !ok {
			continue
		}
		then, thenDels, err := writes(v.RequestTxn.Success)
		if err != nil {
			return nil, nil, err
		}
		other, otherDels, err := writes(v.RequestTxn.Failure)
		if err != nil {
			return nil, nil, err
		}
		for k := range then {
			if err := add(k, nil); err != nil {
				return nil, nil, err
			}
		}
		for k := range other {
			if err := add(k, then); err != nil {
				return nil, nil, err
			}
		}
		all := adt.NewStringAffineInterval("\x00", "")
		dels.Union(thenDels, all)
		dels.Union(otherDels, all)
	}
	for _, op := range ops {
		if v, ok := op.Request.(*pb.RequestOp_RequestPut); ok {
			if err := add(string(v.RequestPut.Key), nil); err != nil {
				return nil, nil, err
			}
		}
	}
	return puts, dels, nil
}

// CheckAlarm checks a request about alarms.
func CheckAlarm(r *pb.AlarmRequest) error {
	_, action := pb.AlarmRequest_AlarmAction_name[int32(r.Action)]
	_, kind := pb.AlarmType_name[int32(r.Alarm)]
	if r.Action == pb.AlarmRequest_GET {
		return nil // there are none of an unknown kind
	}
	if !action || !kind || r.Action == pb.AlarmRequest_ACTIVATE && r.Alarm == pb.AlarmType_NONE {
		return fmt.Errorf("%w: alarm %v %v", ErrBadCommand, r.Action, r.Alarm)
	}
	return nil
}

// checkRequest is the check of a request that comes out of the log.
func checkRequest(r *pb.InternalRaftRequest) error {
	switch {
	case r.Put != nil:
		return CheckPut(r.Put)
	case r.DeleteRange != nil:
		return CheckDelete(r.DeleteRange)
	case r.Txn != nil:
		return CheckTxn(r.Txn)
	case r.Alarm != nil:
		return CheckAlarm(r.Alarm)
	case r.LeaseCheckpoint != nil:
		for _, c := range r.LeaseCheckpoint.Checkpoints {
			if c == nil {
				return ErrBadCommand
			}
		}
	}
	return nil
}
