"""A small catalogue in Django's models."""

from __future__ import annotations

from django.db import models
from django.db.models import Value
from django.db.models.functions import Lower

from stillroom.web.django.after_commit import InvalidatingManager, invalidates


@invalidates("label:{pk}")
class Label(models.Model):
    text = models.CharField(max_length=20)


class Brand(models.Model):
    name = models.CharField(max_length=20)


@invalidates("products", "product:{id}", "brand:{brand_id}", lambda row: [f"price:{row.price}"])
class Product(models.Model):
    price = models.IntegerField()
    brand = models.ForeignKey(Brand, on_delete=models.CASCADE)
    labels = models.ManyToManyField(Label)
    objects = InvalidatingManager()


class Bottle(Product):
    """A model derived from a marked one."""

    litres = models.IntegerField(default=1)


class Cheap(Product):
    """The same rows under another name."""

    class Meta:
        proxy = True


@invalidates("ticket:{id}", "seat:{seat}")
class Ticket(models.Model):
    """A row whose key, and whose seat, the database makes."""

    id = models.CharField(primary_key=True, max_length=9, db_default=Lower(Value("A")))
    seat = models.IntegerField(db_default=3)


@invalidates("note:{pk}")
class Note(models.Model):
    """A note whose tags need only its key, so that a save sends no query."""

    text = models.CharField(max_length=20)
