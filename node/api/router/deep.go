package router

import (
	"context"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/registry/rest"

	"skein.io/skein/node/api/internal/stack"
)

// Upstream's handlers do each write in a goroutine of its own. What follows is what that goroutine calls first.

type deepCreater struct{ runtime.ObjectCreater }

func (c deepCreater) New(k schema.GroupVersionKind) (runtime.Object, error) {
	stack.Large()
	return c.ObjectCreater.New(k)
}

type deepUpdater struct{ rest.Updater }

func (u deepUpdater) Update(ctx context.Context, name string, info rest.UpdatedObjectInfo, create rest.ValidateObjectFunc, update rest.ValidateObjectUpdateFunc,
	forceAllowCreate bool, o *metav1.UpdateOptions) (runtime.Object, bool, error) {
	stack.Large()
	return u.Updater.Update(ctx, name, info, create, update, forceAllowCreate, o)
}

type deepPatcher struct{ rest.Patcher }

func (p deepPatcher) Update(ctx context.Context, name string, info rest.UpdatedObjectInfo, create rest.ValidateObjectFunc, update rest.ValidateObjectUpdateFunc,
	forceAllowCreate bool, o *metav1.UpdateOptions) (runtime.Object, bool, error) {
	stack.Large()
	return p.Patcher.Update(ctx, name, info, create, update, forceAllowCreate, o)
}
