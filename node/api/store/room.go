package store

import (
	"errors"
	"net/http"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ReasonNoRoom is the reason of the Status that answers a write for which the store has no room. Its
// code is 507: 429 would have clients try again at once and forever, 500 looks like a defect.
const ReasonNoRoom metav1.StatusReason = "InsufficientStorage"

func noRoom(err error) error {
	if err == nil || !errors.Is(err, rpctypes.ErrNoSpace) && grpcstatus.Code(err) != codes.ResourceExhausted {
		return err
	}
	// "Too many requests" of etcd has the same code; it is for a moment only.
	if s, ok := grpcstatus.FromError(err); ok && s.Message() == rpctypes.ErrorDesc(rpctypes.ErrGRPCRequestTooManyRequests) {
		return err
	}
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status: metav1.StatusFailure, Code: http.StatusInsufficientStorage, Reason: ReasonNoRoom, Message: err.Error(),
	}}
}
